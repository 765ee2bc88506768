"""Objectives on logits that were never computed."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_distill.functional.projection import Projection, TopK
from lightning_distill.functional.vocabulary import linear_losses
from lightning_distill.objectives.logits import HardLabel, SoftTarget, require_labels
from lightning_distill.objectives.logits_cosine import LogitsCosine
from lightning_distill.objectives.objective import Objective
from lightning_distill.signals import Signals

# Tokens whose logits are there at one time in validation.
_TOKENS = 256


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


def parts(student: Signals, teacher: Signals | None) -> Iterator[tuple[Signals, Signals | None]]:
    """Signals with logits, for what needs logits as they are: the whole, or a few tokens at a time if deferred.

    Args:
        student: The student's signals.
        teacher: The teacher's, or None.

    Yields:
        Both as they are, or with the logits ``[1, n, V]`` of n tokens that count, and their labels.
    """
    if student.deferred is None:
        yield student, teacher
        return
    hidden = student.deferred.hidden.flatten(0, -2)
    projection = student.deferred.head.projection(hidden)
    of_teacher: Projection | TopK | None = None
    if teacher is not None:
        of_teacher = next(iter(teacher.top_k.values()), None)
        if teacher.deferred is not None:
            of_teacher = teacher.deferred.head.projection(teacher.deferred.hidden.flatten(0, -2))
        elif of_teacher is not None:
            of_teacher = TopK(of_teacher.log_probs.flatten(0, -2), of_teacher.classes.flatten(0, -2))
    everything = torch.arange(len(hidden), device=hidden.device)
    for tokens in (everything if student.mask is None else everything[student.mask.flatten()]).split(_TOKENS):
        logits = projection.take(tokens).logits()[None][..., : student.deferred.words]
        labels = None if student.labels is None else student.labels.flatten()[tokens][None]
        beside = None
        if isinstance(of_teacher, TopK):
            beside = Signals(logits[..., :0], top_k={1.0: of_teacher.take((None, tokens))})
        elif of_teacher is not None:
            beside = Signals(of_teacher.take(tokens).logits()[None])
        elif teacher is not None:
            beside = Signals(teacher.logits.flatten(0, -2)[tokens][None])
        if beside is not None and not beside.top_k:
            words = min(logits.shape[-1], beside.logits.shape[-1])
            logits, beside.logits = logits[..., :words], beside.logits[..., :words]
        yield Signals(logits, labels), beside
