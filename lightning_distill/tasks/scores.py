"""What a student is scored by on one dataloader: its metrics, and its agreement with the teacher."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_distill.signals.deferred import parts
from lightning_distill.signals.signals import Signals
from lightning_distill.tasks.task import Task

Metrics = Metric | MetricCollection | Mapping[str, Metric] | Sequence[Metric]


def by_name(metrics: Metrics) -> dict[str, Metric]:
    """Metrics by the name they are logged as.

    Args:
        metrics: A collection or a dictionary, which have names, or one metric or several, each of which has that of
            its class in short.

    Raises:
        TypeError: If it is something else.
        ValueError: If two have one name.

    Example:
        >>> from torchmetrics.classification import MulticlassF1Score
        >>> from lightning_distill.tasks.scores import by_name
        >>> list(by_name(MulticlassF1Score(3))), list(by_name({"macro_f1": MulticlassF1Score(3)}))
        (['f1'], ['macro_f1'])
    """
    if isinstance(metrics, MetricCollection):
        return {f"{name}{metrics.postfix or ''}": metric for name, metric in metrics.items(keep_base=True)}
    several = [metrics] if isinstance(metrics, Metric) else metrics
    given: list[Any] = []
    if isinstance(several, (Mapping, list, tuple)):
        given = list(several.values() if isinstance(several, Mapping) else several)
    if not given or not all(isinstance(metric, Metric) for metric in given):
        raise TypeError(
            "Expected argument `metrics` to be a torchmetrics metric, a collection, a dictionary or a list of them, "
            f"but got {metrics!r}."
        )
    names = list(several) if isinstance(several, Mapping) else [_short_name(metric) for metric in given]
    if len(set(names)) < len(names):
        raise ValueError(f"Expected argument `metrics` to have different names, but got {names}. Pass a dictionary.")
    return dict(zip(names, given, strict=True))


def _short_name(metric: Metric) -> str:
    name = type(metric).__name__
    short = re.sub(r"^(Binary|Multiclass|Multilabel)|(Score|CorrCoef)$", "", name) or name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", short).lower()


class Scores(nn.Module):
    """The metrics of one dataloader, which keep what they have seen until they are computed.

    Args:
        task: The task.
        metrics: See :func:`by_name`; None for the task's own.
    """

    def __init__(self, task: Task, metrics: Metrics | None) -> None:
        super().__init__()
        self.task = task
        named = dict([task.metric()]) if metrics is None else by_name(metrics)
        self.metrics = nn.ModuleDict({name: metric.clone() for name, metric in named.items()})
        self.agreement: Metric = task.agreement_metric()

    def update(self, student: Signals, teacher: Signals | None, scored: bool = True) -> None:
        """Add a batch.

        Args:
            student: What the student answered, and the labels, if it has any.
            teacher: What the teacher answered; None to leave the agreement out.
            scored: Whether the student's answers are compared with the labels.
        """
        for part, of_teacher in parts(student, teacher):
            if of_teacher is not None:
                self.agreement.update(*self.task.agreement(part, of_teacher))
            if part.labels is None or not scored:
                continue
            logits, labels = self.task.scored(part.logits, part.labels, part.mask)
            if len(labels):
                for metric in self.metrics.values():
                    assert isinstance(metric, Metric)
                    metric.update(_as_taken(metric, logits) if labels.ndim == 1 else logits, labels)

    def fresh(self) -> "Scores":
        """The same metrics for another dataloader, without what these have seen."""
        copied = copy.deepcopy(self)
        for metric in copied.modules():
            if isinstance(metric, Metric):
                metric.reset()
        return copied

    @property
    def has_scores(self) -> bool:
        """Whether any label was there."""
        return any(isinstance(metric, Metric) and metric.update_called for metric in self.metrics.values())


def _as_taken(metric: Metric, logits: Tensor) -> Tensor:
    # torchmetrics' metrics of two classes take the probability of the second.
    binary = type(metric).__name__.startswith("Binary") and logits.ndim == 2 and logits.shape[-1] == 2
    return torch.sigmoid(logits[:, 1] - logits[:, 0]) if binary else logits
