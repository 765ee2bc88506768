"""Weights and temperatures that change during training."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lightning_distill.arguments import between, finite, typed

#: A number, or a function of the training's progress in [0, 1].
Scheduled = float | Callable[[float], float]


def value_at(scheduled: Scheduled, progress: float) -> float:
    """The number that a schedule gives at some progress.

    Args:
        scheduled: A number or a schedule.
        progress: Share of the training that is done, in [0, 1].

    Returns:
        The number.

    Example:
        >>> from lightning_distill.objectives.schedule import LinearSchedule, value_at
        >>> value_at(0.3, 0.5), value_at(LinearSchedule(4.0, 2.0), 0.5)
        (0.3, 3.0)
    """
    return float(scheduled(progress)) if callable(scheduled) else scheduled


@typed
@dataclass(frozen=True)
class LinearSchedule:
    """From one number to another in a straight line.

    Args:
        start: Number up to progress ``begin``.
        end: Number from progress ``finish`` on.
        begin: Progress at which it starts to change.
        finish: Progress at which it has changed.

    Raises:
        ValueError: If not 0 <= begin < finish <= 1.

    Example:
        >>> from lightning_distill.objectives import LinearSchedule
        >>> schedule = LinearSchedule(1.0, 0.0, begin=0.5)
        >>> schedule(0.25), schedule(0.75), schedule(1.0)
        (1.0, 0.5, 0.0)
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0

    def __post_init__(self) -> None:
        finite("start", self.start)
        finite("end", self.end)
        for name, value in (("begin", self.begin), ("finish", self.finish)):
            between(name, value, 0, 1, closed=True)
        if not 0 <= self.begin < self.finish <= 1:
            raise ValueError(
                "Expected arguments `begin` and `finish` to satisfy 0 <= begin < finish <= 1, but got "
                f"{self.begin} and {self.finish}."
            )

    def __call__(self, progress: float) -> float:
        """The number at some progress in [0, 1]."""
        return self.start + (self.end - self.start) * self._share(progress)

    def _share(self, progress: float) -> float:
        return min(max((progress - self.begin) / (self.finish - self.begin), 0.0), 1.0)


@typed
@dataclass(frozen=True)
class CosineSchedule(LinearSchedule):
    """From one number to another along half a cosine, slow at both ends.

    Arguments and errors are those of :class:`LinearSchedule`.

    Example:
        >>> from lightning_distill.objectives import CosineSchedule
        >>> schedule = CosineSchedule(1.0, 0.0)
        >>> [round(schedule(progress), 3) for progress in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.854, 0.5, 0.0]
    """

    def _share(self, progress: float) -> float:
        return (1 - math.cos(math.pi * super()._share(progress))) / 2


@typed
@dataclass(frozen=True)
class StepSchedule:
    """One number after the other.

    Args:
        values: The numbers.
        milestones: Progress at which each but the first begins, increasing; one fewer than the values.

    Raises:
        ValueError: If their numbers do not fit or the milestones do not increase within [0, 1].

    Example:
        >>> from lightning_distill.objectives import StepSchedule
        >>> schedule = StepSchedule([1.0, 0.1], [0.5])
        >>> schedule(0.49), schedule(0.5)
        (1.0, 0.1)
    """

    values: list[float]
    milestones: list[float]

    def __post_init__(self) -> None:
        for value in self.values:
            finite("values", value)
        for milestone in self.milestones:
            between("milestones", milestone, 0, 1, closed=True)
        bounds = [0.0, *self.milestones, 1.0]
        if len(self.values) != len(self.milestones) + 1 or bounds != sorted(bounds):
            raise ValueError(
                "Expected argument `milestones` to increase within [0, 1] and to be one fewer than `values`, but got "
                f"{self.milestones} for {len(self.values)} values."
            )

    def __call__(self, progress: float) -> float:
        """The number at some progress in [0, 1]."""
        return self.values[sum(progress >= milestone for milestone in self.milestones)]
