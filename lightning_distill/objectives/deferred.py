"""Objectives on logits that were never computed."""

from collections.abc import Mapping

from torch import Tensor

from lightning_distill.functional.chunked import Teacher, chunked_losses
from lightning_distill.objectives.logits import require_labels
from lightning_distill.objectives.objective import Objective
from lightning_distill.signals.signals import Signals


def can_defer(objectives: Mapping[str, Objective]) -> bool:
    """Whether all that reads logits can be computed chunk by chunk, see :meth:`Objective.chunked_term`.

    Args:
        objectives: By name.

    Returns:
        True if so, and if there is any.
    """
    reading = [objective for objective in objectives.values() if objective.reads_logits]
    return bool(reading) and all(objective.can_be_chunked for objective in reading)


def deferred_losses(
    objectives: Mapping[str, Objective], student: Signals, teacher: Signals | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The losses on logits of a student whose logits were not computed, in one pass over its last layer.

    Args:
        objectives: By name, see :func:`can_defer`.
        student: Signals with deferred logits.
        teacher: Signals with deferred logits, with logits or with the k best words; None where nobody asks.

    Returns:
        By the names of those that read logits: sum over the tokens that count, and their number.

    Raises:
        ValueError: If all of them need labels and there are none.
    """
    assert student.deferred is not None
    deferred = student.deferred
    reading = {name: objective for name, objective in objectives.items() if objective.reads_logits}
    # Without labels there is nothing for a hard label to count.
    able = {name: each for name, each in reading.items() if student.labels is not None or not each.needs_labels}
    if not able:
        require_labels(next(iter(reading.values())), student)
    labels = student.labels if any(objective.needs_labels for objective in able.values()) else None
    terms = [(objective.weight, term) for objective in able.values() if (term := objective.chunked_term()) is not None]
    losses = deferred.head.call(
        lambda projection: chunked_losses(
            projection, terms, _teacher(teacher), labels, student.mask, vocab_size=deferred.vocab_size
        ),
        deferred.hidden,
    )
    count = losses.new_tensor(deferred.hidden[..., 0].numel()) if student.mask is None else student.mask.sum()
    found = {name: (losses.new_zeros(()), 0 * count) for name in reading}
    return found | {name: (loss, count) for name, loss in zip(able, losses.unbind(), strict=True)}


def _teacher(teacher: Signals | None) -> Teacher:
    """What the teacher predicts from, or what it predicts."""
    if teacher is None:
        return None
    deferred = teacher.deferred
    return teacher.top_k or teacher.logits if deferred is None else deferred.head.projection(deferred.hidden)
