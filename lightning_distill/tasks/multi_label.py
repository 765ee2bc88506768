"""Several labels a row, each there or not."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_distill.functional.binary import two_logits
from lightning_distill.models.batch import IGNORE_INDEX, labels_of
from lightning_distill.signals.signals import Signals
from lightning_distill.tasks.metrics import MacroF1
from lightning_distill.tasks.task import Task, row_logits


class MultiLabel(Task):
    """Several labels a row, each a coin of its own: a logit per label is read as those of two classes, 0 and 1.

    So cross entropy is :class:`torch.nn.BCEWithLogitsLoss`, a divergence is that of two Bernoulli distributions, and
    means are over all labels of all rows. A label of -100 is unknown: it counts nothing, but what the teacher says of
    it is learned.

    Example:
        >>> import torch
        >>> from lightning_distill.tasks import TASKS
        >>> TASKS["multi_label"].align(torch.tensor([[2.0, -1.0]]), (None, torch.tensor([[1, -100]])))
        (tensor([[[ 0.,  2.],
                 [ 0., -1.]]]), tensor([[   1, -100]]), None)
    """

    name = "multi_label"
    names_classes = True
    problem_type = "multi_label_classification"
    exclusive = False
    named_dim = -2

    def align(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits ``[B, L]`` as ``[B, L, 2]`` beside labels ``[B, L]`` (probabilities as ``[B, L, 2]``)."""
        logits, labels = self.answers(logits), labels_of(batch)
        if labels is None:
            return logits, None, None
        if not logits.shape[-1]:  # nothing but the labels says how many there are
            logits = logits.new_empty(*labels.shape, 0)
        return logits, self.targets(logits, labels), None

    def answers(self, logits: Tensor) -> Tensor:
        """Logits ``[B, L, 2]`` of each label, which may be in this form."""
        if logits.ndim == 3 and logits.shape[-1] == 2:
            return logits
        logits = row_logits(self, logits, "rows, labels")
        return two_logits(logits.unsqueeze(-1)) if logits.numel() else logits.new_empty(*logits.shape, 0)

    def _targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim == 1 and logits.shape[1] == 1:
            labels = labels.unsqueeze(-1)
        if labels.is_cpu:
            self.check_labels(labels, logits.shape[1], "a batch")
        if not labels.is_floating_point():
            return labels.long()
        known = (labels != IGNORE_INDEX).unsqueeze(-1)
        labels = labels.float()
        return torch.stack([1 - labels, labels], -1).where(known, IGNORE_INDEX)

    def settle(self, *made: Signals | None) -> None:
        """Give what a step of the user's own made, logits and labels ``[B, L]``, the form that :meth:`align` gives."""
        for signals in made:
            if signals is not None and signals.logits.ndim < 3:
                signals.logits, signals.labels, _ = self.align(signals.logits, (None, signals.labels))

    def has_count(self, batch: Any) -> bool:
        """Whether there are labels, which alone say how many each row has."""
        return labels_of(batch) is not None

    def packed(self, logits: Tensor) -> Tensor:
        """One logit ``[B, L]`` for each label."""
        return (logits[..., -1:] - logits[..., :1]).flatten(1)

    def unpacked(self, logits: Tensor) -> Tensor:
        """Logits ``[B, L, 2]``."""
        return self.answers(logits)

    def check_labels(self, labels: Tensor, num_classes: int | None, where: str) -> None:
        """Refuse labels that are not ``[B, L]``, or are none of 0, 1, a probability and -100."""
        if labels.ndim != 2 or labels.shape[1] != (num_classes or labels.shape[1]) or labels.is_complex():
            raise ValueError(
                f"Expected the labels of {where} to have the shape [rows, {num_classes or 'labels'}], a 0 or 1 for "
                f"each label of each row, but got {labels.dtype} of shape {list(labels.shape)}. Numbers of classes "
                "become such rows by `torch.nn.functional.one_hot`; for one class a row pass `task='classification'`."
            )
        unknown, between = labels == IGNORE_INDEX, (labels >= 0) & (labels <= 1)
        if bool((wrong := ~(unknown | between)).any()):
            raise ValueError(
                f"Expected the labels of {where} to be 0, 1 or a probability, or {IGNORE_INDEX} where it is not known, "
                f"but got {labels[wrong][0].item():.4g}."
            )

    # -- scores ------------------------------------------------------------------------------------------------------

    def metric(self) -> tuple[str, Metric]:
        """Macro F1."""
        return "macro_f1", MacroF1(ignore_index=IGNORE_INDEX)

    def scored(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Probabilities and labels ``[N, L]`` of the rows with a label, as metrics of several labels take them."""
        labels = self.classes(labels)
        rows = (labels != IGNORE_INDEX).any(-1)
        return self.packed(logits)[rows].float().sigmoid(), labels[rows]
