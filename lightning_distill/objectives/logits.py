"""Objectives on the models' predictions."""

import math
from typing import get_args

from lightning_distill import functional
from lightning_distill.functional.soft_target import Divergence
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.signals import Signals


class SoftTarget(Objective):
    """The teacher's softened prediction, see :func:`lightning_distill.functional.soft_target`.

    The loss is scaled by the squared temperature. Where there is a single logit (regression), in which a softmax would
    be a silent zero, it is the squared difference of the logits instead; temperature and divergence then mean nothing.

    Args:
        temperature: Divides the logits, finite and above 0.
        divergence: ``"forward_kl"``, ``"reverse_kl"`` or ``"js"``.
        beta: Weight of the teacher in the mixture of ``"js"``, in (0, 1).
        weight: Factor of the loss in the total.
        name: What it is logged as.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import SoftTarget
        >>> from lightning_distill.signals import Signals
        >>> student, teacher = Signals(torch.tensor([[0.0, 0.0]])), Signals(torch.tensor([[2.0, 0.0]]))
        >>> round(SoftTarget(temperature=2.0)(student, teacher).mean().item(), 4)
        0.4438
    """

    def __init__(
        self,
        temperature: float = 2.0,
        divergence: Divergence = "forward_kl",
        *,
        beta: float = 0.5,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if not (temperature > 0 and math.isfinite(temperature)):
            raise self._error("temperature", "finite and above 0", temperature)
        if divergence not in get_args(Divergence):
            raise self._error("divergence", f"one of {get_args(Divergence)}", divergence)
        if not 0 < beta < 1:
            raise self._error("beta", "in (0, 1)", beta)
        self.temperature, self.divergence, self.beta = temperature, divergence, beta

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Divergence per row, or per token."""
        if student.logits.shape[-1] == 1:
            values = functional.logits_mse(student.logits, teacher.logits, mask=student.mask, reduction="none")
        else:
            values = functional.soft_target(
                student.logits,
                teacher.logits,
                temperature=self.temperature,
                divergence=self.divergence,
                beta=self.beta,
                mask=student.mask,
                reduction="none",
            )
        return Loss(values, student.mask)


class HardLabel(Objective):
    """The labels of the data: cross entropy, or squared error where labels are floating point or there is one logit.

    Args:
        label_smoothing: Share of the label that is spread evenly over the classes, in [0, 1).
        weight: Factor of the loss in the total.
        name: What it is logged as.

    Raises:
        ValueError: If an argument is out of its range, or a batch has no labels.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import HardLabel
        >>> from lightning_distill.signals import Signals
        >>> student = Signals(torch.zeros(3, 2), labels=torch.tensor([0, 1, -100]))
        >>> loss = HardLabel()(student, student)
        >>> loss.count().item(), round(loss.mean().item(), 4)
        (2, 0.6931)
    """

    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0, *, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        if not 0 <= label_smoothing < 1:
            raise self._error("label_smoothing", "in [0, 1)", label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(self, student: Signals, teacher: Signals | None) -> Loss:
        """Loss per row, or per token."""
        labels, mask = student.labels, student.mask
        if labels is None:
            raise ValueError(f"Expected objective `{self.name}` to be given labels, but got a batch without them.")
        if not labels.is_floating_point() and student.logits.shape[-1] > 1:
            labelled = labels != functional.IGNORE_INDEX
            mask = labelled if mask is None else mask & labelled
        values = functional.hard_label(
            student.logits, labels, label_smoothing=self.label_smoothing, mask=mask, reduction="none"
        )
        return Loss(values, mask)
