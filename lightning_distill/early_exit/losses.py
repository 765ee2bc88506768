"""What ramps are trained by: labels, the teacher, or the student's own last answer; and their gates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_distill.functional import hard_label, soft_target
from lightning_distill.models.batch import IGNORE_INDEX, batch_of
from lightning_distill.objectives.logits import HardLabel, SoftTarget
from lightning_distill.objectives.objective import Objective
from lightning_distill.step.counting import before
from lightning_distill.tasks import Task

#: What counts: items with a label, and all items.
_HARD, _SOFT = HardLabel(), SoftTarget()
#: Logits and gate of each ramp by its layer.
RampAnswers = Mapping[int, tuple[Tensor, Tensor | None]]
#: Takes the mean over a batch, and how much any batch of the step counts, to the share of it in the step.
Mean = Callable[[str, Tensor, Callable[[Any], Tensor]], Tensor]


@dataclass(frozen=True)
class RampLoss:
    """The loss of each ramp on a batch.

    Args:
        from_student: Whether the student's own last logits are the target, and labels are not read.
        teacher_weight: Share of the loss that is learned from a teacher's logits.
        temperature: Of soft targets.
    """

    from_student: bool = False
    teacher_weight: float = 0.0
    temperature: float = 1.0

    def __call__(
        self, task: Task, answers: RampAnswers, batch: Any, targets: Mapping[str, Tensor], mean: Mean
    ) -> dict[int, Tensor]:
        """Scalars by layer.

        Args:
            task: What the ramps answer.
            answers: What they answered.
            batch: The batch.
            targets: Logits of the ``"student"`` or the ``"teacher"``, where they are a target.
            mean: Puts a mean in the place of one batch's.
        """
        return {
            layer: self._of_one(task, logits, gate, batch, targets, mean) for layer, (logits, gate) in answers.items()
        }

    def _of_one(
        self,
        task: Task,
        logits: Tensor,
        gate: Tensor | None,
        batch: Any,
        targets: Mapping[str, Tensor],
        mean: Mean,
    ) -> Tensor:
        logits, labels, mask = task.align(logits, batch)

        def averaged(value: Tensor, objective: Objective) -> Tensor:
            return mean(f"ramps, by {objective.name}", value, lambda one: _count(task, objective, one))

        def towards(who: str) -> Tensor:
            return averaged(_towards(task, logits, task.answers(targets[who]), self.temperature, mask), _SOFT)

        what: Objective
        right: Tensor | None
        if self.from_student:
            loss, what, right = towards("student"), _SOFT, task.answers(targets["student"]).argmax(-1)
        else:
            loss, what, right = averaged(_of_labels(task, logits, labels, mask), _HARD), _HARD, labels
            if self.teacher_weight:
                loss = (1 - self.teacher_weight) * loss + self.teacher_weight * towards("teacher")
        if gate is not None and right is not None:
            loss = loss + averaged(_of_gate(gate, logits, right, mask), what)
        return loss


def _of_gate(gate: Tensor, logits: Tensor, right: Tensor, mask: Tensor | None) -> Tensor:
    """How wrong a gate is about whether its ramp is right, over the items that have an answer."""
    right = right.argmax(-1) if right.is_floating_point() else right
    correct = (logits.argmax(-1) == right).float()
    counts = right != IGNORE_INDEX if mask is None else mask & (right != IGNORE_INDEX)
    wrong = F.binary_cross_entropy_with_logits(gate[counts].float(), correct[counts], reduction="sum")
    return wrong / counts.sum().clamp(min=1)


def _of_labels(task: Task, logits: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """How far logits are from the labels, 0 where there are none."""
    if labels is None:
        return logits.flatten()[:0].float().sum()
    if not task.has_classes:
        return F.mse_loss(logits.float(), labels.view_as(logits).float())
    return hard_label(logits, labels, mask=mask)


def _towards(task: Task, logits: Tensor, target: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """How far logits are from soft targets; in regression the squared error."""
    if not task.has_classes:
        return F.mse_loss(logits.float(), target.float())
    return soft_target(logits, target, temperature=temperature, mask=mask)


def _count(task: Task, objective: Objective, batch: Any) -> Tensor:
    signals = before(task, batch_of("student", batch))
    count = objective.count(signals, signals)
    assert count is not None
    return count
