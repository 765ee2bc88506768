"""Knowledge distillation, quantisation and early exit for PyTorch Lightning."""

from lightning_distill.checkpoint import AtomicCheckpointIO, newest_checkpoint
from lightning_distill.module import DistillationModule
from lightning_distill.student import student_from_teacher

__version__ = "0.1.0"

__all__ = [
    "AtomicCheckpointIO",
    "DistillationModule",
    "__version__",
    "newest_checkpoint",
    "student_from_teacher",
]
