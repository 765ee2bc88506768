"""Losses on how the rows of a batch relate to each other.

The value of a row depends on the other rows, so these losses change with the batch size and with how a batch is split.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.functional.reduction import Reduction, check_same_shape, reduce, select


def similarity_preserving(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Mean squared difference of the similarities :math:`F F^\top` of the rows, each row of it scaled to length 1.

    Args:
        student: Shape ``[B, D_s]``.
        teacher: Shape ``[B, D_t]``.
        mask: Bool ``[B]``, the rows that count; None where all do.
        reduction: ``"mean"`` over rows, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B]`` with ``reduction="none"``.

    Raises:
        ValueError: If the numbers of rows differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.tensor([[1.0], [1.0]]), torch.eye(2)
        >>> round(functional.similarity_preserving(student, teacher).item(), 4)
        0.2929

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019.
    """
    check_same_shape(student[:, 0], teacher[:, 0], "student", "teacher")
    similarities = []
    for rows in select(mask, student, teacher):
        with torch.autocast(rows.device.type, enabled=False):
            similarities.append(F.normalize(rows @ rows.T, dim=1))
    values = (similarities[0] - similarities[1]).square().sum(1) / max(len(similarities[0]), 1)
    return reduce(values, student.shape[:1], mask, reduction)


def relational_distance(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Huber difference of the distances between rows, in units of their mean distance.

    The value of row :math:`i` is the mean over all rows :math:`j` (with :math:`j = i`, which adds 0).

    Args:
        student: Shape ``[B, D_s]``.
        teacher: Shape ``[B, D_t]``.
        mask: Bool ``[B]``, the rows that count; None where all do.
        reduction: ``"mean"`` over rows, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B]`` with ``reduction="none"``.

    Raises:
        ValueError: If the numbers of rows differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [5.0]])
        >>> round(functional.relational_distance(student, teacher).item(), 4)
        0.045

    Source: Park et al., "Relational Knowledge Distillation", 2019.
    """
    check_same_shape(student[:, 0], teacher[:, 0], "student", "teacher")
    scaled = []
    for rows in select(mask, student, teacher):
        # The faster way through a matrix product loses the small distances.
        distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        mean = distance.sum() / max(len(rows) * (len(rows) - 1), 1)
        scaled.append(distance / mean.clamp(min=torch.finfo(rows.dtype).tiny))
    values = F.smooth_l1_loss(scaled[0], scaled[1], reduction="none").sum(1) / max(len(scaled[0]), 1)
    return reduce(values, student.shape[:1], mask, reduction)


def relational_angle(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Huber difference of the cosines of the angles that three rows form.

    The value of row :math:`i` is the mean over all :math:`j, k` of the angle at :math:`i`; memory grows with
    :math:`B^2 D + B^3`.

    Args:
        student: Shape ``[B, D_s]``.
        teacher: Shape ``[B, D_t]``.
        mask: Bool ``[B]``, the rows that count; None where all do.
        reduction: ``"mean"`` over rows, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B]`` with ``reduction="none"``.

    Raises:
        ValueError: If the numbers of rows differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
        >>> round(functional.relational_angle(student, teacher).item(), 4)
        0.1296

    Source: Park et al., "Relational Knowledge Distillation", 2019.
    """
    check_same_shape(student[:, 0], teacher[:, 0], "student", "teacher")
    cosines = []
    for rows in select(mask, student, teacher):
        difference = rows.unsqueeze(0) - rows.unsqueeze(1)
        norm = difference.norm(dim=-1, keepdim=True)
        # Rows that coincide have no direction; dividing by 1 there keeps their gradient finite.
        directions = difference / norm.masked_fill(norm == 0, 1.0)
        with torch.autocast(rows.device.type, enabled=False):
            cosines.append(directions @ directions.transpose(1, 2))
    values = F.smooth_l1_loss(cosines[0], cosines[1], reduction="none").sum((1, 2)) / max(len(cosines[0]), 1) ** 2
    return reduce(values, student.shape[:1], mask, reduction)


def contrastive(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross entropy of finding, among the teacher's rows, the one of the same input, by cosine.

    :math:`-\log \mathrm{softmax}_j(\cos(s_i, t_j) / \tau)_{j = i}`; the other rows of the batch are the negatives.

    Args:
        student: Shape ``[B, D]``.
        teacher: Likewise.
        temperature: Divides the cosines, above 0.
        mask: Bool ``[B]``, the rows that count; None where all do.
        reduction: ``"mean"`` over rows, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B]`` with ``reduction="none"``.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> round(functional.contrastive(torch.eye(3), torch.eye(3), temperature=1.0).item(), 4)
        0.5514

    Source: van den Oord et al., "Contrastive Predictive Coding", 2018 (InfoNCE), between student and teacher as in Tian
    et al., "Contrastive Representation Distillation", 2020, which draws its negatives from a memory bank instead.
    """
    check_same_shape(student, teacher, "student", "teacher")
    s, t = (F.normalize(rows, dim=-1) for rows in select(mask, student, teacher))
    with torch.autocast(s.device.type, enabled=False):
        similarity = s @ t.T / temperature
    target = torch.arange(len(s), device=s.device)
    return reduce(F.cross_entropy(similarity, target, reduction="none"), student.shape[:1], mask, reduction)
