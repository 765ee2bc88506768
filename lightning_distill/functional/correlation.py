"""Correlation of the predictions of student and teacher, between the classes and within each."""

import torch
from torch import Tensor

from lightning_distill.functional.reduction import Reduction, reduce, select
from lightning_distill.functional.soft_target import check_classes

# Share of the size below which a deviation is rounding: such probabilities do not vary, and correlate with nothing.
_ROUNDING = 1e-6


def correlation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""What the softened predictions lack to a perfect correlation (DIST), times the squared temperature.

    With :math:`\rho` Pearson's correlation and :math:`q, p` the predictions ``[N, C]`` of student and teacher, item
    :math:`i` has :math:`\tau^2 \left(\beta (1 - \rho(q_i, p_i)) + \gamma (1 - \frac{1}{C} \sum_c \rho(q_{:c},
    p_{:c}))\right)`. The second part is that of the whole batch, the same for all of its items: it depends on the batch
    size, and on how a batch is split. What does not vary, as the classes of a batch of one item, has a correlation of 0
    and no gradient. With two classes the first part is 0 or 2, without a gradient.

    Args:
        student_logits: Shape ``[..., C]``, of at least 2 classes.
        teacher_logits: Likewise.
        temperature: Divides both logits, above 0.
        beta: Weight of the part between classes.
        gamma: Weight of the part within classes.
        mask: Bool ``[...]``, the items that count; None where all do.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If shapes differ, there is one class only, or the temperature is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.eye(3), torch.eye(3).roll(1, 0)
        >>> round(functional.correlation(student, teacher).item(), 4)
        3.0

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022.
    """
    check_classes(student_logits, teacher_logits, temperature)
    q, p = (torch.softmax(logits / temperature, -1) for logits in select(mask, student_logits, teacher_logits))
    between, within = (1 - (_direction(q, axis) * _direction(p, axis)).sum(axis) for axis in (1, 0))
    values = temperature**2 * (beta * between + gamma * within.mean())
    return reduce(values, student_logits.shape[:-1], mask, reduction, num_items)


def _direction(x: Tensor, axis: int) -> Tensor:
    """Deviations from the mean along an axis, scaled to length 1; 0 where there are none."""
    deviations = x - x.mean(axis, keepdim=True)
    length = deviations.norm(dim=axis, keepdim=True)
    return deviations / length.masked_fill(length <= _ROUNDING * x.norm(dim=axis, keepdim=True), torch.inf)
