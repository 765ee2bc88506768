"""The objective for a teacher that reads text in other words than the student."""

import torch
from torch import Tensor

from lightning_distill import functional
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.objectives.schedule import Scheduled
from lightning_distill.signals import Signals


class UniversalLogit(Objective):
    """Distance of sorted probabilities, see :func:`lightning_distill.functional.universal_logit`.

    Teacher and student may have different vocabularies and cut the same text into different tokens. The batch then has
    the teacher's own inputs as ``teacher_input_ids``, ``teacher_attention_mask`` and ``teacher_labels`` beside the
    student's. In each row the first token that counts is compared with the teacher's first, the second with the second,
    as far as the shorter one goes, as in the paper.

    It says how sure to be and not of what: use it beside :class:`HardLabel`.

    Args:
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import UniversalLogit
        >>> from lightning_distill.signals import Signals
        >>> student, teacher = torch.zeros(1, 3, 2), torch.tensor([[[-100.0, 0.0, -100.0]] * 2])
        >>> loss = UniversalLogit()(Signals(student), Signals(teacher))
        >>> loss.count().item(), loss.mean().item()
        (2, 1.0)
    """

    any_vocabulary, needs_classes = True, True

    def __init__(self, *, weight: Scheduled = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)

    def count(self, student: Signals, teacher: Signals) -> Tensor:
        """Rows, or tokens, that both have."""
        return _paired(_mask(student), _mask(teacher))[0].sum()

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Distance per row, or per token."""
        mask, of_teacher = _paired(_mask(student), _mask(teacher))
        distances = functional.universal_logit(student.logits[mask], teacher.logits[of_teacher], reduction="none")
        return Loss(distances.new_zeros(mask.shape).masked_scatter(mask, distances), mask)


def _mask(signals: Signals) -> Tensor:
    if signals.mask is not None:
        return signals.mask
    return torch.ones(signals.logits.shape[:-1], dtype=torch.bool, device=signals.logits.device)


def _paired(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Of two masks with the same rows, the first items of each row, as many as the other one has too."""
    if student.ndim == 1:
        return student & teacher, student & teacher
    counts = torch.minimum(student.sum(1), teacher.sum(1))[:, None]
    return student & (student.cumsum(1) <= counts), teacher & (teacher.cumsum(1) <= counts)
