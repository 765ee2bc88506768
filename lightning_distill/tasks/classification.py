"""One class a row."""

from typing import Any

import torch
from torch import Tensor

from lightning_distill.functional.binary import two_logits
from lightning_distill.models.batch import IGNORE_INDEX, labels_of
from lightning_distill.tasks.task import Task, row_logits


class Classification(Task):
    """One class a row; a model of one logit has two classes, and takes the probability of class 1 for a label."""

    name = "classification"
    names_classes = True
    problem_type = "single_label_classification"

    def align(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See :meth:`Task.align`: beside one logit, fractions ``[B]`` or ``[B, 1]`` are probabilities of class 1."""
        labels = labels_of(batch)
        if labels is not None and labels.is_floating_point() and (logits.ndim == 1 or logits.shape[-1] == 1):
            batch = (None, _of_two_classes(labels))
        return super().align(logits, batch)

    def answers(self, logits: Tensor) -> Tensor:
        """Logits ``[B, C]`` of at least two classes."""
        return two_logits(row_logits(self, logits, "rows, classes"))

    def _settled(self, logits: Tensor) -> Tensor:
        return two_logits(logits)


def _of_two_classes(labels: Tensor) -> Tensor:
    """Fractions ``[B]`` or ``[B, 1]`` as probabilities ``[B, 2]``; whole numbers, and any other shape, as they are."""
    chances = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    known = chances != IGNORE_INDEX
    # Looked at wherever they lie, as whole numbers are classes, which may have weights.
    if chances.ndim != 1 or bool((chances == chances.round()).all()):
        return labels
    if bool((wrong := known & ~((chances >= 0) & (chances <= 1))).any()):
        raise ValueError(
            "Expected labels that are fractions, beside one logit, to be probabilities of class 1, but got "
            f"{chances[wrong][0].item():.4g}. For real values pass `task='regression'`."
        )
    return torch.stack([1 - chances, chances], -1).where(known.unsqueeze(-1), IGNORE_INDEX)
