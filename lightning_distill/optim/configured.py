"""An optimizer and its schedule in the form that Lightning takes."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeSchedule = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau | dict]


def configured(
    parameters: list[nn.Parameter],
    optimizer: MakeOptimizer | None,
    lr_scheduler: MakeSchedule | None,
    *,
    lr: float,
    interval: Literal["epoch", "step"],
    monitor: str | None,
) -> OptimizerLRScheduler:
    """Make an optimizer and its schedule.

    Args:
        parameters: What is trained.
        optimizer: Called with them; None: AdamW.
        lr_scheduler: Called with the optimizer; returns a scheduler, Lightning's dictionary, or None.
            None: no schedule.
        lr: Learning rate of the optimizer that is made where none is given.
        interval: How often the scheduler moves.
        monitor: The logged metric that a plateau waits for.

    Raises:
        ValueError: If a plateau is to wait for nothing.

    Example:
        >>> import torch
        >>> from lightning_distill.optim.configured import configured
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> type(configured([weight], None, None, lr=1e-3, interval="epoch", monitor=None)).__name__
        'AdamW'
    """
    made: Optimizer = torch.optim.AdamW(parameters, lr=lr) if optimizer is None else optimizer(parameters)
    schedule: Any = None if lr_scheduler is None else lr_scheduler(made)
    if schedule is None:
        return made
    if not isinstance(schedule, dict):
        own = getattr(schedule, "monitor", None)  # Lightning's own plateau has it
        schedule = {"scheduler": schedule, "interval": interval, "monitor": own or monitor}
    if isinstance(schedule["scheduler"], ReduceLROnPlateau) and schedule.get("monitor") is None:
        raise ValueError(
            "Expected argument `lr_scheduler_monitor` to be the name of a logged metric, such as 'val_loss', for a "
            "schedule that waits for a plateau, but got None."
        )
    return {"optimizer": made, "lr_scheduler": schedule}
