"""Optimizers, parameter groups, schedules and recommended learning rates, for any LightningModule.

Here belongs what is made once and handed to the Trainer. What acts between two steps is a callback.
"""

from lightning_distill.optim.groups import parameter_groups
from lightning_distill.optim.optimizers import build_optimizer
from lightning_distill.optim.recommended import LRRange, recommended_lr
from lightning_distill.optim.schedules import build_lr_scheduler

__all__ = ["LRRange", "build_lr_scheduler", "build_optimizer", "parameter_groups", "recommended_lr"]
