"""How the predictions of student and teacher correlate."""

from lightning_distill import functional
from lightning_distill.arguments import typed
from lightning_distill.objectives.logits import Softened
from lightning_distill.objectives.objective import Loss
from lightning_distill.objectives.schedule import Scheduled
from lightning_distill.signals.signals import Signals


@typed
class Correlation(Softened):
    """Correlation of the predictions (DIST), see :func:`lightning_distill.functional.correlation`.

    The student matches their order and proportions and not their size: for a teacher that is far stronger. The loss is
    scaled by the squared temperature. The part within classes is over the batch, so it depends on the batch size. With
    two classes nothing is left between them: only that part teaches.

    Args:
        temperature: Divides the logits, finite and above 0; a number or a schedule. Published: 1 on ImageNet, 4 on
            CIFAR-100.
        beta: Weight of the part between the classes of an item, at least 0.
        gamma: Weight of the part within each class, over the batch, at least 0.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import Correlation
        >>> from lightning_distill.signals.signals import Signals
        >>> student, teacher = Signals(torch.eye(3)), Signals(torch.eye(3).roll(1, 0))
        >>> round(Correlation()(student, teacher).mean().item(), 4)
        3.0
    """

    needs_classes = True

    def __init__(
        self,
        temperature: Scheduled = 1.0,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(temperature, weight, name)
        for argument, factor in (("beta", beta), ("gamma", gamma)):
            if not 0 <= factor < float("inf"):
                raise self._error(argument, "finite and at least 0", factor)
        self.beta, self.gamma = beta, gamma

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Lack of correlation per row, or per token."""
        values = functional.correlation(
            student.logits,
            teacher.logits,
            temperature=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
            mask=student.mask,
            reduction="none",
        )
        return Loss(values, student.mask)
