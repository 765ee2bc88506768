"""What a test set can tell: how many rows were tested, intervals of accuracies, models that always say the same."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_distill.models.batch import IGNORE_INDEX
from lightning_distill.tasks import TASKS

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of the normal distribution, two-sided
Interval = tuple[float, float]


def wilson_interval(share: float, count: int) -> Interval:
    r"""The interval of a share that was counted, with 95 % confidence.

    .. math:: \frac{p + z^2/2n \pm z\sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        share: The share :math:`p`, from 0 to 1.
        count: Of how many independent items :math:`n`, at least 1.

    Returns:
        Its lower and its upper end, inside of 0 and 1 also where all items are right or none is.

    Example:
        >>> from lightning_distill.cli.evidence import wilson_interval
        >>> [round(end, 4) for end in wilson_interval(0.9, 100)]
        [0.8256, 0.9448]

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    shrink = 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / shrink
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def difference_interval(one: float, other: float, count: int) -> Interval:
    """The interval of the difference of two shares of as many items each, with 95 % confidence.

    The items are taken as independent. Two models that are tested on the same rows often err on the same ones, and
    their difference is then surer than this says.

    Args:
        one: A share.
        other: The share that is taken from it.
        count: Of how many items each is.

    Returns:
        The lower and the upper end of ``one - other``.

    Example:
        >>> from lightning_distill.cli.evidence import difference_interval
        >>> [round(end, 3) for end in difference_interval(0.9, 0.8, 100)]
        [0.0, 0.199]

    Source: Newcombe, "Interval Estimation for the Difference between Independent Proportions", 1998 (method 10).
    """
    (low, high), (other_low, other_high) = wilson_interval(one, count), wilson_interval(other, count)
    difference = one - other
    return (
        difference - math.hypot(one - low, other_high - other),
        difference + math.hypot(high - one, other - other_low),
    )


class ItemCount(Metric):
    """How many rows, or tokens that are predicted, were tested, over all processes."""

    full_state_update = False
    items: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("items", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count the items of a batch that have a label."""
        counts = torch.ones_like(target, dtype=torch.bool) if target.is_floating_point() else target != IGNORE_INDEX
        self.items += counts.sum()

    def compute(self) -> Tensor:
        """The number."""
        return self.items


class OneAnswer(Metric):
    """1 where a model gives one and the same class, or number, to all rows, else 0."""

    full_state_update = False
    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("low", torch.tensor(math.inf), dist_reduce_fx="min")
        self.add_state("high", torch.tensor(-math.inf), dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take the answers of a batch in."""
        if preds.ndim > target.ndim:
            answers = preds.argmax(1)
        elif target.is_floating_point():
            answers = preds
        else:  # one logit, or probability, for the second of two classes
            answers = preds > (0.5 if bool(((preds >= 0) & (preds <= 1)).all()) else 0.0)
        if len(answers):
            self.low = torch.minimum(self.low, answers.amin(0).float())
            self.high = torch.maximum(self.high, answers.amax(0).float())

    def compute(self) -> Tensor:
        """Whether all are the same."""
        return (self.low >= self.high).all().float()


class CountTested(L.Callback):
    """Lets the test of a :class:`DistillationModule` say on how many items it was, and whether it had one answer."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Add both to the metrics of the test."""
        if stage == "test" and hasattr(pl_module, "scores"):
            counts = pl_module.scores("test").metrics
            counts["num_items"] = ItemCount()
            if not TASKS[pl_module.task].of_words:  # what is one answer to a text?
                counts["one_answer"] = OneAnswer()


@dataclass
class Outcome:
    """What the test of one model found, beside its scores.

    Args:
        items: Rows, or tokens that are predicted.
        one_answer: Whether it gave one answer to all of them.
        interval: Of its accuracy; None for other metrics.
    """

    items: int
    one_answer: bool = False
    interval: Interval | None = None

    @classmethod
    def of(cls, scores: Mapping[str, float], metric: str) -> "Outcome":
        """Read it off what was logged in the test.

        Args:
            scores: What was logged, by name.
            metric: Name of the metric that decides; an accuracy has an interval, another metric none.
        """
        items, value = int(scores["test_num_items"]), scores[f"test_{metric}"]
        counted = metric == "accuracy" and items > 0 and math.isfinite(value)
        one_answer = items > 1 and bool(scores.get("test_one_answer", 0))
        return cls(items, one_answer, wilson_interval(value, items) if counted else None)


def remarks(tested: Mapping[str, Outcome], values: Mapping[str, Any], metric: str) -> list[str]:
    """What has to be said under a table, so that no number in it is taken for more than it is.

    Args:
        tested: The test of each model; the student and those it stands beside.
        values: The metric of each.
        metric: Its name.

    Returns:
        A sentence for each model that gives one answer to all rows, and for each whose accuracy cannot be told from the
        student's.
    """
    found = []
    for model, test in tested.items():
        if test.one_answer:
            found.append(
                f"The {_name(model)} gives one answer to all {test.items} test rows: its {metric} of "
                f"{values[model]:.4f} says nothing of what it has learnt."
            )
    student = tested["student"]
    for model, test in tested.items():
        if model == "student" or None in (student.interval, test.interval) or student.one_answer or test.one_answer:
            continue
        low, high = difference_interval(values["student"], values[model], student.items)
        if low <= 0 <= high:
            found.append(
                f"{student.items} test rows cannot tell the {metric} of the student from that of the {_name(model)}: "
                f"the difference is {values['student'] - values[model]:+.4f}, somewhere from {low:+.4f} to {high:+.4f}."
            )
    return found


def _name(model: str) -> str:
    return model.replace("_", " ")
