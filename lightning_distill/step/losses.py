"""Each objective's loss on the two signals, before it is a mean."""

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
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
            loss = nothing_of(student) if unlabelled else objective(student, teacher)
            found[name] = loss.sum(), loss.count()
    return {name: found[name] for name in objectives}


def nothing_of(student: Signals) -> Loss:
    """The loss of no item, whose gradient, 0, reaches all that the student answers: DDP waits for every parameter."""
    answers = (student.logits, *student.modules.values())
    return Loss(torch.cat([answer.flatten()[:0].float() for answer in answers]))


def weighted_sum(objectives: Mapping[str, Objective], losses: Mapping[str, Tensor]) -> Tensor:
    """Sum of scalars by name, each times the weight of its objective.

    Args:
        objectives: By name.
        losses: Of some of them.
    """
    return torch.stack([objectives[name].weight * loss for name, loss in losses.items()]).sum()


def totals_of(
    objectives: Mapping[str, Objective], losses: Mapping[str, Tensor], own: Callable[[dict[str, Tensor]], Tensor]
) -> dict[str, Tensor]:
    """The sums that a step minimises, by the name that each objective has for its :attr:`Objective.total`.

    Args:
        objectives: By name.
        losses: Scalars by name.
        own: Takes the losses of the total ``"loss"`` to their sum.
    """
    parts = defaultdict[str, dict[str, Tensor]](dict)
    for name, loss in losses.items():
        parts[objectives[name].total][name] = loss
    return {"loss": own(parts.pop("loss"))} | {total: weighted_sum(objectives, part) for total, part in parts.items()}
