"""The loss on the labels of the data."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.functional.reduction import Reduction, reduce, select

IGNORE_INDEX = -100


def hard_label(
    student_logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    pos_weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Cross entropy with labels that are classes or probabilities; squared error with logits of width 1.

    Args:
        student_logits: Shape ``[..., C]``.
        labels: Shape ``[...]``, a class (integers of any width, or bool), or -100 for an item that does not count; or
            ``[..., C]``, floating point, the probability of each class, all -100 for an item that does not count.
            Beside a single logit, any numbers.
        label_smoothing: Share of the label that is spread evenly over the classes, in [0, 1).
        class_weights: Floating point ``[C]``, factor of the loss of each class. Where labels are classes the mean is
            then divided by the sum of the weights of the labels, as by :class:`torch.nn.CrossEntropyLoss`.
        pos_weight: Floating point, a scalar or ``[L]`` beside logits ``[..., L, 2]``: factor of the loss of class 1, as
            by :class:`torch.nn.BCEWithLogitsLoss`; the mean is over items, whatever their weights.
        mask: Bool ``[...]``, the items that count; None where all do that have a label.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If shapes do not fit or the smoothing is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> logits = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
        >>> round(functional.hard_label(logits, torch.tensor([1, -100])).item(), 4)
        0.6931
        >>> round(functional.hard_label(logits, torch.tensor([[0.5, 0.5], [1.0, 0.0]])).item(), 4)
        0.3466
        >>> functional.hard_label(torch.tensor([[1.0], [4.0]]), torch.tensor([3.0, 4.0])).item()
        2.0
    """
    _check(student_logits, labels, label_smoothing, class_weights, pos_weight)
    shape = student_logits.shape[:-1]
    if student_logits.shape[-1] == 1:
        student, target = select(mask, student_logits, labels.reshape(student_logits.shape))
        return reduce((student - target).square().mean(-1), shape, mask, reduction, num_items)
    labels = labels if labels.is_floating_point() else labels.long()
    labelled = has_label(labels, soft=labels.is_floating_point())
    mask = labelled if mask is None else mask & labelled
    (student,), target = select(mask, student_logits), labels[mask]
    target = target.to(student.dtype) if target.is_floating_point() else target
    weights = None if class_weights is None else class_weights.to(student)
    values = F.cross_entropy(student, target, weights, reduction="none", label_smoothing=label_smoothing)
    if pos_weight is not None:
        excess = (pos_weight.to(student) - 1).expand(shape)[mask] * _share_of_class_1(target, label_smoothing)
        values = values - excess * student.log_softmax(-1)[..., 1]
    if weights is not None and not labels.is_floating_point() and reduction == "mean" and num_items is None:
        num_items = weights[target].sum().clamp(min=torch.finfo(weights.dtype).tiny)
    return reduce(values, shape, mask, reduction, num_items)


def has_label(labels: Tensor, *, soft: bool) -> Tensor:
    """Which items have a label.

    Args:
        labels: Classes ``[...]``, -100 where there is none, or probabilities ``[..., C]``, all -100 there.
        soft: Whether they are probabilities.

    Returns:
        Bool ``[...]``.
    """
    return (labels != IGNORE_INDEX).all(-1) if soft else labels != IGNORE_INDEX


def _share_of_class_1(target: Tensor, label_smoothing: float) -> Tensor:
    share = target[..., 1] if target.is_floating_point() else target
    return (1 - label_smoothing) * share + label_smoothing / 2


def _check(
    student_logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    class_weights: Tensor | None,
    pos_weight: Tensor | None,
) -> None:
    *shape, classes = student_logits.shape
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"Expected argument `label_smoothing` to be in [0, 1), but got {label_smoothing}.")
    if class_weights is not None and (classes == 1 or list(class_weights.shape) != [classes]):
        raise ValueError(
            f"Expected argument `class_weights` to have one weight for each of {classes} classes, at least two, but "
            f"got shape {list(class_weights.shape)}."
        )
    if pos_weight is not None and (
        classes != 2 or class_weights is not None or list(pos_weight.shape) not in ([], shape[1:][-1:])
    ):
        raise ValueError(
            "Expected argument `pos_weight` to be a number, or one for each of several labels, beside logits of two "
            f"classes and without `class_weights`, but got shape {list(pos_weight.shape)} for logits of shape "
            f"{list(student_logits.shape)}."
        )
    if classes == 1 and labels.numel() != student_logits.numel():
        raise ValueError(
            f"Expected argument `labels` to have a value per logit, but got shape {list(labels.shape)} for logits of "
            f"shape {[*shape, 1]}."
        )
    if classes > 1 and labels.is_floating_point() and labels.shape != student_logits.shape:
        raise ValueError(
            f"Expected argument `labels` to hold classes, or a probability per class, but got {labels.dtype} of shape "
            f"{list(labels.shape)} for logits of shape {[*shape, classes]}. Use `functional.logits_mse` for real "
            "values."
        )
    if classes > 1 and not labels.is_floating_point() and list(labels.shape) != shape:
        raise ValueError(
            f"Expected argument `labels` to have shape {shape}, but got {list(labels.shape)}: one label per row of "
            "logits."
        )
