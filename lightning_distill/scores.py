"""What a student is scored by on one dataloader: its metrics, and its agreement with the teacher."""

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from lightning_distill import tasks
from lightning_distill.metrics import Pearson
from lightning_distill.objectives.vocabulary import parts
from lightning_distill.signals import Signals

Metrics = Metric | MetricCollection | Mapping[str, Metric]


def by_name(metrics: Metrics) -> dict[str, Metric]:
    """Metrics by the name they are logged as.

    Args:
        metrics: A collection or a dictionary, which have names, or one metric, which has that of its class in short.

    Raises:
        TypeError: If it is something else.

    Example:
        >>> from torchmetrics.classification import MulticlassF1Score
        >>> from lightning_distill.scores import by_name
        >>> list(by_name(MulticlassF1Score(3))), list(by_name({"macro_f1": MulticlassF1Score(3)}))
        (['f1'], ['macro_f1'])
    """
    if isinstance(metrics, Metric):
        short = re.sub(r"^(Binary|Multiclass|Multilabel)|(Score|CorrCoef)$", "", type(metrics).__name__)
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", short or type(metrics).__name__).lower()
        return {snake: metrics}
    named = dict(metrics.items()) if isinstance(metrics, (MetricCollection, Mapping)) else {}
    if not named or not all(isinstance(metric, Metric) for metric in named.values()):
        raise TypeError(
            f"Expected argument `metrics` to be a torchmetrics metric, a collection or a dictionary of them, but got "
            f"{metrics!r}."
        )
    return named


class Scores(nn.Module):
    """The metrics of one dataloader, which keep what they have seen until they are computed.

    Args:
        task: The name of the task.
        metrics: See :func:`by_name`; None for the task's own.
    """

    def __init__(self, task: tasks.Task, metrics: Metrics | None) -> None:
        super().__init__()
        self.task: tasks.Task = task
        named = dict([tasks.default_metric(task)]) if metrics is None else by_name(metrics)
        self.metrics = nn.ModuleDict({name: metric.clone() for name, metric in named.items()})
        self.agreement: Metric = Pearson() if task == "regression" else MeanMetric()

    def update(self, student: Signals, teacher: Signals | None, scored: bool = True) -> None:
        """Add a batch.

        Args:
            student: What the student answered, and the labels, if it has any.
            teacher: What the teacher answered; None to leave the agreement out.
            scored: Whether the student's answers are compared with the labels.
        """
        for part, of_teacher in parts(student, teacher):
            if of_teacher is not None:
                self.agreement.update(*tasks.agreement(self.task, part, of_teacher))
            if part.labels is None or not scored:
                continue
            logits, labels = tasks.flatten(self.task, part.logits, part.labels, part.mask)
            if len(labels):
                for metric in self.metrics.values():
                    assert isinstance(metric, Metric)
                    metric.update(_as_taken(metric, logits), labels)

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
