"""Each objective's loss on the two signals, before it is a mean."""

from collections.abc import Mapping

from torch import Tensor

from lightning_distill.objectives.deferred import deferred_losses
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.signals.signals import Signals


def sums_and_counts(
    objectives: Mapping[str, Objective], student: Signals, teacher: Signals | None, *, labels_may_lack: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum of each objective's loss over the items that count, and how many do.

    Args:
        objectives: By name.
        student: The student's signals.
        teacher: The teacher's; None where no objective reads them.
        labels_may_lack: Whether a batch without labels counts nothing for an objective that reads them; an error if
            not.

    Returns:
        Two scalars by name, in the order of the objectives.
    """
    found = {} if student.deferred is None else deferred_losses(objectives, student, teacher)
    for name, objective in objectives.items():
        if name not in found:
            unlabelled = labels_may_lack and student.labels is None and objective.needs_labels
            loss = Loss(student.logits.flatten()[:0].float()) if unlabelled else objective(student, teacher)
            found[name] = loss.sum(), loss.count()
    return {name: found[name] for name in objectives}
