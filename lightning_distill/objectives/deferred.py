"""Objectives on logits that were never computed."""

from collections.abc import Mapping

from torch import Tensor

from lightning_distill.functional.chunked import linear_losses
from lightning_distill.functional.projection import Projection, TopK
from lightning_distill.objectives.logits import HardLabel, SoftTarget, require_labels
from lightning_distill.objectives.logits_cosine import LogitsCosine
from lightning_distill.objectives.objective import Objective
from lightning_distill.signals.signals import Signals


def can_defer(objectives: Mapping[str, Objective]) -> bool:
    """Whether all that reads logits is computed chunk by chunk: one soft target or cosine, one hard label, or both.

    A hard label with class weights is not.

    Args:
        objectives: By name.

    Returns:
        True if so.
    """
    reading = [objective for objective in objectives.values() if objective.reads_logits]
    kinds = [type(objective) for objective in reading]
    if any(isinstance(objective, HardLabel) and objective.class_weights is not None for objective in reading):
        return False
    alone = kinds.count(HardLabel) <= 1 and len(kinds) - kinds.count(HardLabel) <= 1
    return bool(kinds) and alone and set(kinds) <= {SoftTarget, LogitsCosine, HardLabel}


def deferred_losses(
    objectives: Mapping[str, Objective], student: Signals, teacher: Signals | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Soft target (or cosine) and hard label of a student whose logits were not computed.

    Args:
        objectives: By name, see :func:`can_defer`.
        student: Signals with deferred logits.
        teacher: Signals with deferred logits, with logits or with the k best words; None where nobody asks.

    Returns:
        By the names of those that read logits: sum over the tokens that count, and their number.

    Raises:
        ValueError: If a hard label has no labels.
    """
    soft = next(((name, o) for name, o in objectives.items() if isinstance(o, SoftTarget | LogitsCosine)), None)
    hard = next(((name, o) for name, o in objectives.items() if isinstance(o, HardLabel)), None)
    labels = student.labels
    if hard is not None and soft is None:
        labels = require_labels(hard[1], student)
    assert student.deferred is not None
    target: Projection | TopK | Tensor | None = None
    if soft is not None:
        assert teacher is not None
        target = teacher.logits
        if teacher.top_k and isinstance(soft[1], SoftTarget):
            target = teacher.top_k[soft[1].temperature]
        if teacher.deferred is not None:
            target = teacher.deferred.head.projection(teacher.deferred.hidden)

    def sums(projection: Projection) -> Tensor:
        return linear_losses(
            projection,
            target,
            None if hard is None else labels,
            student.mask,
            **({} if soft is None else soft[1].options()),
            label_smoothing=0.0 if hard is None else hard[1].label_smoothing,
            weights=(0.0 if soft is None else soft[1].weight, 0.0 if hard is None else hard[1].weight),
            words=student.deferred.words if student.deferred is not None else None,
        )

    losses = student.deferred.head.call(sums, student.deferred.hidden)
    count = losses.new_tensor(student.deferred.hidden[..., 0].numel()) if student.mask is None else student.mask.sum()
    found = {}
    for index, one in enumerate((soft, hard)):
        if one is not None:
            # Without labels there is nothing for the hard label to count.
            found[one[0]] = losses[index], count * (index == 0 or labels is not None)
    return found
