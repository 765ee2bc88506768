"""Distances between features ``[B, N, D]`` (N tokens or positions of width D) that need no common width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.functional.reduction import Reduction, check_same_shape, reduce, select
from lightning_distill.functional.tensors import full_precision


def normalized_mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Squared distance of two vectors scaled to length 1, as in patient distillation.

    :math:`\lVert h_s / \lVert h_s \rVert - h_t / \lVert h_t \rVert \rVert^2`, in [0, 4]; the sum over the width, not
    its mean.

    Args:
        student: Shape ``[..., D]``.
        teacher: Likewise.
        mask: Bool ``[...]``, the items that count; None where all do.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> functional.normalized_mse(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item()
        2.0

    Source: Sun et al., "Patient Knowledge Distillation for BERT Model Compression", 2019.
    """
    check_same_shape(student, teacher, "student", "teacher")
    s, t = (F.normalize(x, dim=-1) for x in select(mask, student, teacher))
    return reduce((s - t).square().sum(-1), student.shape[:-1], mask, reduction)


def flow(
    student_first: Tensor,
    student_second: Tensor,
    teacher_first: Tensor,
    teacher_second: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared difference of the flow between layers, the Gram matrix :math:`\frac{1}{N} F_1^\top F_2`.

    Args:
        student_first: Shape ``[B, N, D1]``.
        student_second: Shape ``[B, N, D2]``.
        teacher_first: Shape ``[B, N', D1]``.
        teacher_second: Shape ``[B, N', D2]``.
        mask: Bool ``[B, N]``, the tokens that count (N = N'); None where all do.
        reduction: ``"mean"`` over rows, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B]`` with ``reduction="none"``.

    Raises:
        ValueError: If the Gram matrices of student and teacher have different shapes.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> one, two = torch.ones(1, 5, 3), torch.full((1, 5, 4), 2.0)
        >>> functional.flow(one, one, one, one).item(), functional.flow(one, two, one, two / 2).item()
        (0.0, 1.0)

    Source: Yim et al., "A Gift from Knowledge Distillation", 2017 (there the sum over the matrix).
    """
    grams = []
    for first, second in ((student_first, student_second), (teacher_first, teacher_second)):
        first, second, count = _masked(first, mask), _masked(second, mask), _count(first, mask)
        with torch.autocast(first.device.type, enabled=False):
            grams.append(first.transpose(1, 2) @ second / count[:, None, None])
    check_same_shape(grams[0], grams[1], "student_first", "teacher_first")
    return _reduce_rows((grams[0] - grams[1]).square().mean((1, 2)), mask, reduction)


def neuron_selectivity(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Squared maximum mean discrepancy of the neurons' activation patterns, with the kernel :math:`(x^\top y)^2`.

    Each neuron is the vector of its activations over the N positions, scaled to length 1. For this kernel the
    discrepancy is :math:`\lVert \frac{1}{D_s} \hat F_s \hat F_s^\top - \frac{1}{D_t} \hat F_t \hat F_t^\top \rVert^2`,
    so widths may differ.

    Args:
        student: Shape ``[B, N, D_s]``.
        teacher: Shape ``[B, N, D_t]``.
        mask: Bool ``[B, N]``, the positions that count; None where all do.
        reduction: ``"mean"`` over rows, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B]`` with ``reduction="none"``.

    Raises:
        ValueError: If the numbers of positions differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student = torch.tensor([[[1.0], [0.0]]])
        >>> functional.neuron_selectivity(student, student.flip(1)).item()
        2.0

    Source: Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017.
    """
    check_same_shape(student[..., 0], teacher[..., 0], "student", "teacher")
    similarities = []
    for features in (student, teacher):
        neurons = F.normalize(_masked(features, mask), dim=1)
        with torch.autocast(neurons.device.type, enabled=False):
            similarities.append(neurons @ neurons.transpose(1, 2) / neurons.shape[-1])
    return _reduce_rows((similarities[0] - similarities[1]).square().sum((1, 2)), mask, reduction)


def attention_transfer(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Mean squared difference of where activations are large: :math:`\sum_d F_d^2` over positions, scaled to length 1.

    Args:
        student: Shape ``[B, N, D_s]``.
        teacher: Shape ``[B, N, D_t]``.
        mask: Bool ``[B, N]``, the positions that count; None where all do.
        reduction: ``"mean"`` over rows, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B]`` with ``reduction="none"``.

    Raises:
        ValueError: If the numbers of positions differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student = torch.tensor([[[1.0], [0.0]]])
        >>> functional.attention_transfer(student, student.flip(1)).item()
        1.0

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, with the squared distance and the mean
    over positions of the authors' code (the paper's distance has no gradient at 0).
    """
    check_same_shape(student[..., 0], teacher[..., 0], "student", "teacher")
    maps = [F.normalize(_masked(features, mask).square().mean(-1), dim=1) for features in (student, teacher)]
    values = (maps[0] - maps[1]).square().sum(1) / _count(maps[0], mask)
    return _reduce_rows(values, mask, reduction)


def _masked(features: Tensor, mask: Tensor | None) -> Tensor:
    features = full_precision(features)
    return features if mask is None else features.masked_fill(~mask.unsqueeze(-1), 0.0)


def _count(features: Tensor, mask: Tensor | None) -> Tensor:
    """Number of positions that count in each row, at least 1."""
    if mask is None:
        return torch.full((features.shape[0],), features.shape[1], device=features.device)
    return mask.sum(1).clamp(min=1)


def _reduce_rows(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    rows = None if mask is None else mask.any(1)
    return reduce(values if rows is None else values[rows], values.shape, rows, reduction)
