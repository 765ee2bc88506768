"""Knowledge distillation, quantisation and early exit for PyTorch Lightning."""

from lightning_distill.module import DistillationModule

__version__ = "0.1.0"

__all__ = ["DistillationModule", "__version__"]
