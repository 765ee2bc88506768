"""A soft target that becomes harder as the student learns."""

import math

import torch
from torch import Tensor, nn

from lightning_distill import functional
from lightning_distill.arguments import typed
from lightning_distill.functional.tensors import full_precision
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.objectives.schedule import CosineSchedule, Scheduled
from lightning_distill.signals.signals import Signals


@typed
class CurriculumTemperature(Objective):
    r"""The forward KL at a learned temperature that makes it harder for the student (CTKD).

    The loss is :math:`\tau^2 \mathrm{KL}(p \| q)` at :math:`\tau = \tau_{low} + (\tau_{high} - \tau_{low})
    \sigma(\theta)`. The student descends it and :math:`\theta` ascends it: its gradient is multiplied by
    :math:`-\lambda`, which grows from 0 to 1 along half a cosine. The temperature is one for all items, as in the
    paper's global form. It is a parameter, so that it is in checkpoints, and moves with the optimizer's learning rate:
    with one that is meant for fine-tuning (5e-5) hardly at all. Give it a group of its own then
    (``lightning_distill.optim.parameter_groups``).

    Args:
        temperature: At the start, between ``lowest`` and ``highest``.
        lowest: What it can fall to, above 0.
        highest: What it can rise to, finite.
        warmup: Share of the training in which the reversed gradient reaches its full size, in (0, 1]. Published: 10
            of 240 epochs.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import CurriculumTemperature
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = CurriculumTemperature(temperature=2.0)
        >>> objective.set_progress(1.0)
        >>> loss = objective(Signals(torch.tensor([[0.0, 0.0]])), Signals(torch.tensor([[2.0, 0.0]]))).mean()
        >>> loss.backward()
        >>> round(loss.item(), 4), round(objective.temperature, 4), objective.position.grad.item() < 0
        (0.4438, 2.0, True)

    Source: Li et al., "Curriculum Temperature for Knowledge Distillation", 2023.
    """

    needs_classes = True

    def __init__(
        self,
        temperature: float = 15.6,
        *,
        lowest: float = 1.0,
        highest: float = 21.0,
        warmup: float = 0.04,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if not 0 < lowest < math.inf:
            raise self._error("lowest", "finite and above 0", lowest)
        if not lowest < highest < math.inf:
            raise self._error("highest", f"finite and above `lowest`, {lowest}", highest)
        if not lowest < temperature < highest:
            raise self._error("temperature", f"between `lowest` and `highest`, {lowest} and {highest}", temperature)
        if not 0 < warmup <= 1:
            raise self._error("warmup", "in (0, 1]", warmup)
        self.lowest, self.highest, self.warmup = lowest, highest, warmup
        self._strength = CosineSchedule(0.0, 1.0, finish=warmup)
        share = (temperature - lowest) / (highest - lowest)
        #: :math:`\theta`, a scalar.
        self.position = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    @property
    def temperature(self) -> float:
        """What divides the logits now."""
        return float(self._temperature_at(self.position.detach()))

    def _temperature_at(self, position: Tensor) -> Tensor:
        return self.lowest + (self.highest - self.lowest) * torch.sigmoid(position)

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Divergence per row, or per token."""
        temperature = self._temperature_at(functional.reverse_gradient(self.position, self._strength(self._progress)))
        logits = (full_precision(signals.logits) / temperature for signals in (student, teacher))
        values = functional.soft_target(*logits, mask=student.mask, reduction="none")
        return Loss(temperature**2 * values, student.mask)

    def extra_repr(self) -> str:
        """Weight, name and temperature, for ``print``."""
        return f"{super().extra_repr()}, temperature={self.temperature:.4g}"
