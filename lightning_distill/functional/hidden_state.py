"""Distances between hidden states of student and teacher."""

from torch import Tensor

from lightning_distill.functional.divergences import cosine_distance
from lightning_distill.functional.reduction import Reduction, check_same_shape, reduce, select


def hidden_state_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Mean squared difference of two hidden states, :math:`\frac{1}{D} \lVert h_s - h_t \rVert^2` of a token.

    Args:
        student: Shape ``[..., D]``, projected to the teacher's width.
        teacher: Likewise.
        mask: Bool ``[...]``, the tokens that count; None where all do.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``; float32, or float64 for float64 states.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> mask = torch.tensor([[True, False]])
        >>> functional.hidden_state_mse(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 3.0), mask=mask).item()
        9.0

    Source: Jiao et al., "TinyBERT", 2020.
    """
    check_same_shape(student, teacher, "student", "teacher")
    s, t = select(mask, student, teacher)
    return reduce((s - t).square().mean(-1), student.shape[:-1], mask, reduction, num_items)


def hidden_state_cosine(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""One minus the cosine of the angle between two hidden states, in [0, 2], of a token.

    Args:
        student: Shape ``[..., D]``, projected to the teacher's width.
        teacher: Likewise.
        mask: Bool ``[...]``, the tokens that count; None where all do.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``; float32, or float64 for float64 states.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> functional.hidden_state_cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        1.0

    Source: Sanh et al., "DistilBERT", 2019.
    """
    check_same_shape(student, teacher, "student", "teacher")
    s, t = select(mask, student, teacher)
    values, _ = cosine_distance(s, t)
    return reduce(values, student.shape[:-1], mask, reduction, num_items)
