"""The soft target in two parts."""

from torch import Tensor

from lightning_distill import functional
from lightning_distill.arguments import typed
from lightning_distill.objectives.logits import Softened, count_labelled, labelled
from lightning_distill.objectives.objective import Loss
from lightning_distill.objectives.schedule import Scheduled
from lightning_distill.signals.signals import Signals


@typed
class Decoupled(Softened):
    """Target and non-target part of the soft target apart, see :func:`lightning_distill.functional.decoupled`.

    The loss is scaled by the squared temperature. It needs labels and, to say anything new, three classes.

    Args:
        temperature: Divides the logits, finite and above 0; a number or a schedule.
        alpha: Weight of the target part, at least 0.
        beta: Weight of the non-target part, at least 0. Published: 1 to 8, the larger the surer the teacher is.
        standardize: Whether z-scores of the logits take their place, so that their size does not matter.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If an argument is out of its range, or a batch has no labels.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import Decoupled
        >>> from lightning_distill.signals.signals import Signals
        >>> student = Signals(torch.zeros(1, 3), labels=torch.tensor([0]))
        >>> teacher = Signals(torch.tensor([[2.0, 1.0, 0.0]]))
        >>> round(Decoupled(temperature=1.0)(student, teacher).mean().item(), 4)
        1.1166
    """

    needs_labels, needs_classes = True, True

    def __init__(
        self,
        temperature: Scheduled = 4.0,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        standardize: bool = False,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(temperature, weight, name)
        for argument, factor in (("alpha", alpha), ("beta", beta)):
            if not 0 <= factor < float("inf"):
                raise self._error(argument, "finite and at least 0", factor)
        self.alpha, self.beta, self.standardize = alpha, beta, standardize

    def count(self, student: Signals, teacher: Signals) -> Tensor | None:
        """Rows, or tokens, that have a label."""
        return count_labelled(self, student)

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Divergence per row, or per token."""
        labels, mask = labelled(self, student)
        if labels.is_floating_point():
            raise ValueError(
                f"Expected objective `{self.name}` to be given one class per item as its label, but got {labels.dtype} "
                f"of shape {list(labels.shape)}. Learn from probabilities by `HardLabel`."
            )
        values = functional.decoupled(
            student.logits,
            teacher.logits,
            labels,
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
            standardize=self.standardize,
            mask=mask,
            reduction="none",
        )
        return Loss(values, mask)
