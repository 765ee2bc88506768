"""Knowledge distillation, quantisation and early exit for PyTorch Lightning."""

from lightning_distill.module import DistillationModule
from lightning_distill.student import student_from_teacher

__version__ = "0.1.0"

__all__ = ["DistillationModule", "__version__", "student_from_teacher"]
