"""Real values, one or several a row."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_distill.signals.signals import Signals
from lightning_distill.tasks.metrics import Pearson
from lightning_distill.tasks.task import Task, row_logits


class Regression(Task):
    """Real values, one or several a row, each with a label of its own."""

    name = "regression"
    has_classes = False
    problem_type = "regression"
    exclusive = False

    def answers(self, logits: Tensor) -> Tensor:
        """Values ``[B, C]``."""
        return row_logits(self, logits, "rows, values")

    def _targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        items = logits.shape[:-1]
        numbers = labels.dtype != torch.bool and labels.numel() == max(logits.numel(), items.numel())
        if not numbers or labels.shape[:1] != logits.shape[:1]:
            raise ValueError(
                f"Expected the labels of regression to be {list(logits.shape)} numbers, but got {labels.dtype} of "
                f"shape {list(labels.shape)}. For two classes with one logit, pass `task='classification'`."
            )
        shape = items if logits.shape[-1] <= 1 else logits.shape
        return (labels if labels.dtype == torch.float64 else labels.float()).reshape(shape)

    def _any_label(self, labels: Tensor) -> bool:
        return True

    def metric(self) -> tuple[str, Metric]:
        """Pearson's correlation."""
        return "pearson", Pearson()

    def agreement_metric(self) -> Metric:
        """Pearson's correlation."""
        return Pearson()

    def agreement(self, student: Signals, teacher: Signals) -> tuple[Tensor, ...]:
        """Both values."""
        return _values(student.logits), _values(teacher.logits)

    def scored(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values and labels of all rows."""
        return _values(logits), labels.float()


def _values(logits: Tensor) -> Tensor:
    """The real values ``[B]`` that logits ``[B, 1]`` are; of several ``[B, C]``."""
    return logits.squeeze(-1).float()
