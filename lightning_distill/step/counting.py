"""How much of the data has counted for each objective, so that data without a label are an error and a batch is not."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_distill.models.batch import batch_of, ids_of, labels_of, offsets, token_mask
from lightning_distill.objectives import Objective
from lightning_distill.signals.signals import Signals
from lightning_distill.tasks.task import Task


def before(task: Task, batch: Any) -> Signals:
    """What a batch says before a model runs on it: labels and masks, with logits of width 0.

    Args:
        task: What it asks for.
        batch: What the model reads, see :func:`lightning_distill.models.batch.batch_of`.

    Returns:
        Signals for :meth:`lightning_distill.objectives.Objective.count`.

    Example:
        >>> import torch
        >>> from lightning_distill.step.counting import before
        >>> from lightning_distill.tasks import TASKS
        >>> before(TASKS["classification"], (torch.zeros(5, 4), torch.arange(5))).logits.shape
        torch.Size([5, 0])
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    dims = 2 if task.of_tokens else 1
    first = next(x for x in (labels_of(batch), *ids_of(batch), *tree_leaves(batch)) if isinstance(x, Tensor))
    logits, labels, mask = task.align(torch.empty(*first.shape[:dims], 0, device=first.device), batch)
    real = token_mask(batch)
    if real is None and ids is not None:
        real = torch.ones_like(ids, dtype=torch.bool)
    regression, vectors = not task.has_classes, task.of_vectors
    return Signals(logits, labels, mask, real, regression=regression, vectors=vectors, offsets=offsets(batch))


def counted_ahead(task: Task, objectives: Mapping[str, Objective], batch: Any) -> Tensor | None:
    """How much of a batch counts for each objective, as far as its labels and masks tell.

    For an objective of one's own without :meth:`~lightning_distill.objectives.Objective.count`, and one on module
    paths, they do not; then both models run once more, without gradient.

    Args:
        task: What it asks for.
        objectives: By name.
        batch: The batch.

    Returns:
        Shape ``[objectives]``; None where only the forwards can tell.
    """
    if not all(objective.counts_ahead for objective in objectives.values()) or not task.has_count(batch):
        return None
    student, teacher = (before(task, batch_of(role, batch)) for role in ("student", "teacher"))
    counts = [objective.count(student, teacher) for objective in objectives.values()]
    return None if any(count is None for count in counts) else torch.stack(counts)  # type: ignore[arg-type]


class Counted:
    """Sums of what counted for each objective, since the last check."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, stage: str, counts: Tensor) -> None:
        """Add a batch.

        Args:
            stage: ``"train"``, ``"validate"`` or ``"test"``.
            counts: How much counted for each objective, shape ``[objectives]``.
        """
        # On the device: nobody waits for a number before the epoch ends.
        self._totals[stage] = counts.detach() + self._totals.get(stage, torch.zeros_like(counts))

    def check(self, stage: str, objectives: Mapping[str, Objective], over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Refuse an epoch in which nothing counted for an objective that reads labels, or for any, and begin anew.

        Args:
            stage: As in :meth:`add`.
            objectives: By name, those that were counted.
            over_ranks: Sums a tensor over all processes.

        Raises:
            ValueError: If so.
        """
        if (totals := self._totals.pop(stage, None)) is None:
            return
        counted = over_ranks(totals).gt(0).tolist()
        empty = [
            name
            for (name, objective), some in zip(objectives.items(), counted, strict=True)
            if not some and objective.needs_labels
        ]
        if not any(counted):
            empty = list(objectives)
        if empty:
            raise ValueError(
                f"Expected the data to {stage} on to have labels for the objectives {empty}, but not one item of them "
                "counts: every batch is without `labels`, or all of them are -100. Give them labels, or leave these "
                "objectives out."
            )
