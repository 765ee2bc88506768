"""How much of the data has counted for each objective, so that data without a label are an error and a batch is not."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_distill.objectives import Objective


class Counted:
    """Sums of what counted for each objective, since the last check.

    Args:
        objectives: By name.
    """

    def __init__(self, objectives: Mapping[str, Objective]) -> None:
        self.objectives = dict(objectives)
        self._totals: dict[str, Tensor] = {}

    def add(self, stage: str, counts: Tensor) -> None:
        """Add a batch.

        Args:
            stage: ``"train"``, ``"validate"`` or ``"test"``.
            counts: How much counted for each objective, shape ``[objectives]``.
        """
        # On the device: nobody waits for a number before the epoch ends.
        self._totals[stage] = counts.detach() + self._totals.get(stage, torch.zeros_like(counts))

    def check(self, stage: str, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Refuse an epoch in which nothing counted for an objective that reads labels, or for any, and begin anew.

        Args:
            stage: As in :meth:`add`.
            over_ranks: Sums a tensor over all processes.

        Raises:
            ValueError: If so.
        """
        if (totals := self._totals.pop(stage, None)) is None:
            return
        nothing = [not total for total in over_ranks(totals).gt(0).tolist()]
        named = list(self.objectives.items())
        empty = [
            name for (name, objective), none in zip(named, nothing, strict=True) if none and objective.needs_labels
        ]
        if all(nothing):
            empty = list(self.objectives)
        if empty:
            raise ValueError(
                f"Expected the data to {stage} on to have labels for the objectives {empty}, but not one item of them "
                "counts: every batch is without `labels`, or all of them are -100. Give them labels, or leave these "
                "objectives out."
            )
