"""What ramps are trained by: any objective on logits, and whether their gates are right."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_distill.early_exit.ramps import Ramps
from lightning_distill.functional.reduction import reduce, select
from lightning_distill.models.batch import IGNORE_INDEX, batch_of
from lightning_distill.objectives.logits import HardLabel, SoftTarget, require_labels
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.objectives.schedule import Scheduled
from lightning_distill.signals.description import ModelInfo
from lightning_distill.signals.signals import Request, Signals
from lightning_distill.step.counting import before
from lightning_distill.step.losses import sums_and_counts, weighted_sum
from lightning_distill.tasks import TASKS, Task


class RampObjective(Objective):
    """What each ramp of a student learns, in the place of the student's last logits; the sum over the ramps.

    Args:
        objective: Any objective on logits alone.
        task: What the ramps answer.
        weights: Factor of each ramp by its layer.
        path: Where the ramps are in the student.
        from_student: Whether the target is the student's own last answer.
        weight: Factor of the sum.

    Example:
        >>> import torch
        >>> from lightning_distill.early_exit.losses import RampObjective
        >>> from lightning_distill.objectives import HardLabel
        >>> from lightning_distill.signals.signals import Signals
        >>> from lightning_distill.tasks import TASKS
        >>> learned = RampObjective(HardLabel(), TASKS["classification"], {0: 1.0, 1: 2.0})
        >>> logits, labels = torch.zeros(3, 2), torch.tensor([0, 1, -100])
        >>> student = Signals(logits, labels, modules={"ramps.0": logits, "ramps.1": logits})
        >>> learned.name, round(learned(student, None).mean().item(), 4)
        ('ramps_hard_label', 2.0794)
    """

    total = "ramps_loss"

    def __init__(
        self,
        objective: Objective,
        task: Task,
        weights: Mapping[int, float],
        *,
        path: str = "ramps",
        from_student: bool = False,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name or f"ramps_{objective.name}")
        self.objective, self.task, self.weights = objective, task, dict(weights)
        self.path, self.from_student = path, from_student
        self.needs_teacher = objective.needs_teacher and not from_student
        self.needs_labels = objective.needs_labels
        self.reads_logits = self.needs_teacher or from_student
        #: Whether the ramps learn now; if not, the loss is what it is, and its gradient 0.
        self.learns = True

    def bind(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Ask for what the ramps answer."""
        self.student_request = Request(modules=frozenset(f"{self.path}.{layer}" for layer in self.weights))

    @property
    def top_k_temperatures(self) -> tuple[float, ...] | None:
        """Those of the objective."""
        return self.objective.top_k_temperatures

    def count(self, student: Signals, teacher: Signals) -> Tensor | None:
        """What counts for the objective."""
        return self.objective.count(student, teacher)

    def forward(self, student: Signals, teacher: Signals | None) -> Loss:
        """Loss per row, or per token."""
        target = replace(student, logits=student.logits.detach()) if self.from_student else teacher
        losses = {layer: self._of_one(layer, self._of_ramp(layer, student), target) for layer in self.weights}
        values = torch.stack([self.weights[layer] * loss.values for layer, loss in losses.items()]).sum(0)
        # Not left out: under DDP every parameter takes part in every step.
        values = values if self.learns else values.detach() + 0.0 * values
        return Loss(values, next(iter(losses.values())).mask)

    def _of_ramp(self, layer: int, student: Signals) -> Signals:
        return replace(student, logits=self.task.answers(student.modules[f"{self.path}.{layer}"]))

    def _of_one(self, layer: int, ramp: Signals, target: Signals | None) -> Loss:
        loss: Loss = self.objective(ramp, target)
        return loss


class RampGates(RampObjective):
    """How wrong each gate is about whether its ramp is right, over what counts for the ramp's objective."""

    def bind(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Ask for what the ramps answer, and for how sure their gates are."""
        super().bind(student, teacher)
        gates = frozenset(f"{path}.gate" for path in self.student_request.modules)
        self.student_request |= Request(modules=gates)

    def _of_one(self, layer: int, ramp: Signals, target: Signals | None) -> Loss:
        if self.from_student:
            assert target is not None
            right = target.logits
        else:
            right = require_labels(self, ramp)
        right = right.argmax(-1) if right.is_floating_point() else right
        counts = right != IGNORE_INDEX if ramp.mask is None else ramp.mask & (right != IGNORE_INDEX)
        gate, correct = ramp.modules[f"{self.path}.{layer}.gate"], (ramp.logits.argmax(-1) == right).float()
        gate, correct = select(counts, gate.reshape_as(correct), correct)
        wrong = F.binary_cross_entropy_with_logits(gate, correct, reduction="none")
        return Loss(reduce(wrong, counts.shape, counts, "none"), counts)


def ramp_objectives(
    ramps: Ramps,
    weights: Mapping[int, float],
    *,
    path: str,
    from_student: bool,
    teacher_weight: float,
    temperature: float,
) -> list[RampObjective]:
    """What ramps learn: the labels and the teacher, or the student's own last answer; and their gates.

    Args:
        ramps: The ramps.
        weights: Factor of each ramp by its layer.
        path: Where they are in the student.
        from_student: Whether the target is the student's own last answer.
        teacher_weight: Share that is learned from the teacher.
        temperature: Of soft targets.
    """
    labels, soft = HardLabel(), SoftTarget(temperature)
    how: dict[str, Any] = {"task": TASKS[ramps.task], "weights": weights, "path": path, "from_student": from_student}
    shares = [(soft, 1.0)] if from_student else [(labels, 1 - teacher_weight), (soft, teacher_weight)]
    learned = [RampObjective(objective, weight=share, **how) for objective, share in shares if share]
    if ramps.criterion.needs_gate:
        learned.append(RampGates(soft if from_student else labels, name="ramps_gate", **how))
    return learned


# -- in a module that has no objectives --------------------------------------------------------------------------------

#: Takes the mean over a batch, and how much any batch of the step counts, to the share of it in the step.
Mean = Callable[[str, Tensor, Any, Callable[[Any], Tensor]], Tensor]


def loss_of_ramps(
    learned: Sequence[RampObjective],
    answers: Mapping[int, tuple[Tensor, Tensor | None]],
    logits: Mapping[str, Tensor],
    batch: Any,
    over_step: Mean | None,
) -> Tensor:
    """The weighted sum of what ramps learn of a batch.

    Args:
        learned: See :func:`ramp_objectives`.
        answers: Logits and gate of each ramp by its layer.
        logits: What the ``"student"`` and the ``"teacher"`` answered last; those that are a target are needed.
        batch: The batch.
        over_step: Where the batches of a step are known, weighs the mean of one: see
            :meth:`lightning_distill.step.accumulation.AccumulatingModule.mean_over_step`.

    Raises:
        RuntimeError: If a ramp or a target has not answered.
    """
    some = learned[0]
    if missing := sorted(some.weights.keys() - answers.keys()):
        raise RuntimeError(f"Expected `training_step` to run the student's layers {missing}, but it did not.")
    needs_teacher = any(objective.needs_teacher for objective in learned)
    for who, needed in (("student", some.from_student), ("teacher", needs_teacher)):
        if needed and who not in logits:
            raise RuntimeError(f"Expected `training_step` to call the {who} itself, for its logits; it did not.")
    of_student = logits["student"] if some.from_student else answers[min(some.weights)][0]
    aligned, labels, mask = some.task.align(of_student, batch)
    heard = {f"{some.path}.{layer}": answer for layer, (answer, _) in answers.items()}
    heard |= {f"{some.path}.{layer}.gate": gate for layer, (_, gate) in answers.items() if gate is not None}
    student = Signals(aligned, labels, mask, modules=heard, regression=not some.task.has_classes)
    teacher = Signals(some.task.answers(logits["teacher"])) if needs_teacher else None
    objectives = {objective.name: objective for objective in learned}
    losses = {}
    for name, (total, count) in sums_and_counts(objectives, student, teacher, labels_may_lack=True).items():
        mean = total / count.clamp(min=1)
        counted = partial(_count, objectives[name])
        losses[name] = mean if over_step is None else over_step(name, mean, batch, counted)
    return weighted_sum(objectives, losses)


def _count(objective: RampObjective, batch: Any) -> Tensor:
    signals = before(objective.task, batch_of("student", batch))
    count = objective.count(signals, signals)
    assert count is not None
    return count


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *others: Tensor) -> Tensor:
        ctx.count = len(others)
        return tensor.detach()  # of its own: FSDP2 warns of outputs that are views

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *[None] * ctx.count


def tied(output: Any, others: Sequence[Tensor]) -> Any:
    """What a module gives as it is, behind which other tensors are found in the graph, without a gradient of it.

    Args:
        output: Tensors in any containers.
        others: The other tensors.
    """
    return tree_map_only(Tensor, lambda x: _Tied.apply(x, *others) if x.is_floating_point() else x, output)
