"""The objective on the direction of the logits."""

from lightning_distill import functional
from lightning_distill.arguments import typed
from lightning_distill.functional.terms import CosineTerm
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.objectives.schedule import Scheduled
from lightning_distill.signals.signals import Signals


@typed
class LogitsCosine(Objective):
    """One minus the cosine of the logits, see :func:`lightning_distill.functional.logits_cosine`.

    Over a large vocabulary it is computed chunk by chunk, as :class:`SoftTarget` is.

    Args:
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import LogitsCosine
        >>> from lightning_distill.signals.signals import Signals
        >>> LogitsCosine()(Signals(torch.tensor([[1.0, 0.0]])), Signals(torch.tensor([[0.0, 1.0]]))).mean().item()
        1.0
    """

    needs_classes = True

    def __init__(self, *, weight: Scheduled = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)

    def chunked_term(self) -> CosineTerm:
        """The distance of a chunk of tokens."""
        return CosineTerm()

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """One minus the cosine per row, or per token."""
        values = functional.logits_cosine(student.logits, teacher.logits, mask=student.mask, reduction="none")
        return Loss(values, student.mask)
