"""From values of items to a number, the same way in every loss."""

from typing import Literal

import torch
from torch import Tensor

from lightning_distill.functional.tensors import full_precision

Reduction = Literal["mean", "sum", "none"]


def check_same_shape(student: Tensor, teacher: Tensor, student_name: str, teacher_name: str) -> None:
    """Refuse tensors that cannot be compared.

    Args:
        student: The student's tensor.
        teacher: The teacher's tensor.
        student_name: Name of the argument that holds the first.
        teacher_name: Name of the argument that holds the second.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected arguments `{student_name}` and `{teacher_name}` to have the same shape, but got "
            f"{list(student.shape)} and {list(teacher.shape)}. Student and teacher must read the same tokens."
        )


def select(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The items of each tensor that count, flattened to one leading dimension, in full precision.

    Items that do not count are dropped before anything is computed: they cost nothing, and what is in them (infinity,
    NaN) can reach neither the loss nor the gradient.

    Args:
        mask: Bool, of the items that count; its shape is that of the leading dimensions. None where all count.
        *tensors: Shape ``[*mask.shape, ...]``; without a mask, the last dimension is the item's.

    Returns:
        Tensors ``[N, ...]``.

    Raises:
        ValueError: If the mask is not bool or does not fit.

    Example:
        >>> import torch
        >>> from lightning_distill.functional.reduction import select
        >>> select(torch.tensor([[True, False]]), torch.zeros(1, 2, 7))[0].shape
        torch.Size([1, 7])
    """
    if mask is None:
        return tuple(full_precision(x.reshape(-1, x.shape[-1])) for x in tensors)
    for x in tensors:
        if mask.dtype != torch.bool or x.shape[: mask.ndim] != mask.shape:
            raise ValueError(
                f"Expected argument `mask` to be bool and of the leading shape of {list(x.shape)}, but got "
                f"{mask.dtype} of shape {list(mask.shape)}."
            )
    return tuple(full_precision(x[mask]) for x in tensors)


def reduce(
    values: Tensor,
    shape: torch.Size,
    mask: Tensor | None,
    reduction: Reduction,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Reduce the values of the selected items.

    Args:
        values: Shape ``[N]``, of the items that count.
        shape: Shape of all items.
        mask: Bool of that shape, or None where all count.
        reduction: ``"mean"`` over the items that count (0 where none does), ``"sum"``, or ``"none"``: all items, 0
            where they do not count.
        num_items: What ``"mean"`` divides by in place of the number of items that count, such as that of a whole
            accumulated batch.

    Returns:
        A scalar, or a tensor of ``shape``.

    Raises:
        ValueError: If there is no such reduction.

    Example:
        >>> import torch
        >>> from lightning_distill.functional.reduction import reduce
        >>> mask = torch.tensor([True, False, True])
        >>> reduce(torch.tensor([1.0, 3.0]), torch.Size([3]), mask, "none").tolist()
        [1.0, 0.0, 3.0]
    """
    if reduction == "mean" and num_items is not None:
        return values.sum() / check_num_items(num_items)
    if reduction == "mean":
        return values.sum() / max(values.numel(), 1)
    if reduction == "sum":
        return values.sum()
    if reduction != "none":
        raise ValueError(f'Expected argument `reduction` to be "mean", "sum" or "none", but got {reduction!r}.')
    if mask is None:
        return values.reshape(shape)
    return values.new_zeros(shape).masked_scatter(mask, values)


def check_num_items(num_items: float | Tensor) -> float | Tensor:
    """The denominator itself; a number must be above 0 (a tensor is not looked at, as its device would wait).

    Raises:
        ValueError: If a number is not.
    """
    if not isinstance(num_items, Tensor) and not num_items > 0:
        raise ValueError(f"Expected argument `num_items` to be above 0, but got {num_items}.")
    return num_items
