"""Knowledge distillation, quantisation and early exit for PyTorch Lightning."""

from lightning_distill.module import DistillationModule
from lightning_distill.moved import keep_old_names
from lightning_distill.private_names import warn_of_missing_names
from lightning_distill.students.from_teacher import student_from_teacher
from lightning_distill.training.checkpoint import AtomicCheckpointIO, newest_checkpoint

__version__ = "0.1.0"

__all__ = [
    "AtomicCheckpointIO",
    "DistillationModule",
    "__version__",
    "newest_checkpoint",
    "student_from_teacher",
]

keep_old_names()
warn_of_missing_names()
