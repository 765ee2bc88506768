"""Read and rescale the peak learning rates of optimizers and of the schedules that drive them."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR


def peak_lrs(optimizers: Sequence[Optimizer], schedules: Sequence[Any] = ()) -> list[list[float]]:
    """The learning rate each parameter group is configured with: the one its schedule warms up to or decays from.

    The optimizers may be at any point of their schedules, of which compound ones are looked into. There is one list per
    optimizer.

    Raises:
        ValueError: a group has no learning rate, as with an optimizer that sets its own.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1)
        >>> optimizer.param_groups[0]["lr"], peak_lrs([optimizer], [schedule])
        (0.05, [[0.5]])
    """
    cyclic = {id(schedule.optimizer): schedule for schedule in flattened(schedules) if isinstance(schedule, CyclicLR)}
    peaks = []
    for optimizer in optimizers:
        # OneCycleLR notes its maximum in the group, any other schedule the learning rate it was given.
        noted = [group.get("max_lr", group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        peaks.append(cyclic[id(optimizer)].max_lrs if id(optimizer) in cyclic else noted)
    if any(lr is None for group in peaks for lr in group):
        raise ValueError(
            "Expected every parameter group to have a learning rate, but got None; an optimizer that sets its own "
            "learning rate has nothing to look for"
        )
    return [[float(lr) for lr in group] for group in peaks]


def scale_peak_lrs(
    optimizers: Sequence[Optimizer], schedules: Sequence[Any], factors: Sequence[Sequence[float]]
) -> None:
    """Multiply the peak learning rates of optimizers and schedules as if they had been built with the product.

    There is one factor per parameter group, in one list per optimizer. Floors that are given as absolute numbers
    (``eta_min`` of a cosine, ``min_lr`` of a plateau) stay.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        >>> scale_peak_lrs([optimizer], [schedule], [[10.0]])
        >>> schedule.base_lrs, peak_lrs([optimizer], [schedule])
        ([5.0], [[5.0]])
    """
    by_optimizer = dict(zip(map(id, optimizers), factors, strict=True))
    for optimizer in optimizers:
        for group, factor in zip(optimizer.param_groups, by_optimizer[id(optimizer)], strict=True):
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):
                if name in group:
                    set_lr(group, group[name] * factor, name)
    for schedule in flattened(schedules):
        for name in ("base_lrs", "_last_lr", "max_lrs"):
            if (values := getattr(schedule, name, None)) is not None:
                own = by_optimizer[id(schedule.optimizer)]
                setattr(schedule, name, [value * factor for value, factor in zip(values, own, strict=True)])


def set_lr(group: dict[str, Any], value: float | Tensor, name: str = "lr") -> None:
    """Set a group's learning rate, in place where it is a tensor (captured in a graph, or fused)."""
    if isinstance(group[name], Tensor):
        group[name].fill_(float(value))
    else:
        group[name] = value


def flattened(schedules: Sequence[Any]) -> Iterator[Any]:
    """Each schedule, and those that a compound one is made of."""
    for schedule in schedules:
        yield schedule
        yield from flattened(getattr(schedule, "_schedulers", ()))
