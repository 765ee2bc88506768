"""A step without the logits of a large vocabulary."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_distill.models.batch import batch_of
from lightning_distill.models.calling import call_model, evaluating, logits_of
from lightning_distill.objectives.deferred import can_defer
from lightning_distill.objectives.objective import Objective
from lightning_distill.signals.head import Head, find_head, is_known, withheld


class LargeVocabulary:
    """Says which models make no logits during a step, because every objective takes them chunk by chunk.

    A head is withheld only if its model does to the logits what is known here, which is asked once, before the first
    step, in a forward without gradient whose head makes the logits of one token.

    Args:
        objectives: By name.
    """

    def __init__(self, objectives: Mapping[str, Objective]) -> None:
        self.objectives = objectives
        self._active = False
        self._understood: dict[str, bool] = {}

    @contextmanager
    def during_step(self, student: nn.Module, batch: Any) -> Iterator[None]:
        """Withhold heads meanwhile, where nothing needs whole logits and the student's head is understood.

        Args:
            student: The student.
            batch: The batch.
        """
        self._active = can_defer(self.objectives) and self._head("student", student, batch) is not None
        try:
            yield
        finally:
            self._active = False

    def head(self, role: str, model: nn.Module, batch: Any) -> Head | None:
        """The head that makes no logits now; None where the model is to make them.

        Args:
            role: ``"student"`` or ``"teacher"``.
            model: The model.
            batch: The batch.
        """
        return self._head(role, model, batch) if self._active else None

    def _head(self, role: str, model: nn.Module, batch: Any) -> Head | None:
        head = find_head(model)
        if head is not None and role not in self._understood:
            self._understood[role] = _is_understood(role, model, head, batch)
        return head if self._understood.get(role) else None


def _is_understood(role: str, model: nn.Module, head: Head, batch: Any) -> bool:
    with evaluating(model), torch.no_grad(), withheld({role: head}) as inputs:
        logits = logits_of(call_model(model, batch_of(role, batch)))
    if role not in inputs:
        # Its class reads the weight by itself.
        warnings.warn(f"The {role} does not call its last linear layer, so whole logits are computed.", stacklevel=2)
        return False
    if not is_known(head, inputs[role], logits):
        warnings.warn(
            f"The {role} change their logits after the last linear layer in a way that is not known here, so whole "
            "logits are computed.",
            stacklevel=2,
        )
        return False
    return True
