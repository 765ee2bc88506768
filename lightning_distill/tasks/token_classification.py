"""One class a token, step or pixel."""

from typing import Any

from torch import Tensor

from lightning_distill.functional.binary import two_logits
from lightning_distill.models.batch import IGNORE_INDEX
from lightning_distill.tasks.task import Task, labelled_tokens


class TokenClassification(Task):
    """One class a token, step or pixel. A row without any label counts all its real tokens."""

    name = "token_classification"
    names_classes = True
    of_tokens = True

    def align(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See :meth:`Task.align`: tokens with a label count, and the real ones of rows that have none."""
        logits, labels, real = labelled_tokens(self, logits, batch)
        if labels is None or labels.is_floating_point():
            return logits, labels, real
        return logits, labels, counted(labels, real)

    def answers(self, logits: Tensor) -> Tensor:
        """Logits ``[B, T, C]`` of at least two classes."""
        return two_logits(logits)

    def _settled(self, logits: Tensor) -> Tensor:
        return two_logits(logits)


def counted(labels: Tensor, real: Tensor | None = None) -> Tensor:
    """Which items count: those with a label, and all that are real of rows that have none.

    Args:
        labels: Classes ``[B, ...]``, -100 where there is none.
        real: Bool, of the same shape; None where all are real.
    """
    mask = labels != IGNORE_INDEX
    # Row by row, so that a mean does not change with how rows are put into batches.
    unlabelled = ~mask.flatten(1).any(1).view(-1, *[1] * (mask.ndim - 1))
    return mask | (unlabelled if real is None else unlabelled & real)
