"""Signals whose logits were not computed, a few tokens at a time."""

from collections.abc import Iterator

import torch

from lightning_distill.functional.projection import Projection, TopK
from lightning_distill.signals.signals import Signals

# Tokens whose logits are there at one time in validation.
_TOKENS = 256


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
        logits = projection.take(tokens).logits()[None][..., : student.deferred.vocab_size]
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
