"""The loss on the labels of the data."""

import torch.nn.functional as F
from torch import Tensor

from lightning_distill.functional.reduction import Reduction, full_precision, reduce, select

IGNORE_INDEX = -100


def hard_label(
    student_logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross entropy with integer labels; squared error with labels that are floating point or logits of width 1.

    Args:
        student_logits: Shape ``[..., C]``.
        labels: Shape ``[...]``, a class or -100 for an item that does not count; in regression also ``[..., C]``.
        label_smoothing: Share of the label that is spread evenly over the classes, in [0, 1).
        mask: Bool ``[...]``, the items that count; None where all do that have a label.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.

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
        >>> functional.hard_label(torch.tensor([[1.0], [4.0]]), torch.tensor([3.0, 4.0])).item()
        2.0
    """
    shape = student_logits.shape[:-1]
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"Expected argument `label_smoothing` to be in [0, 1), but got {label_smoothing}.")
    if labels.is_floating_point() or student_logits.shape[-1] == 1:
        if labels.numel() != student_logits.numel():
            raise ValueError(
                f"Expected argument `labels` to have a value per logit, but got shape {list(labels.shape)} for logits "
                f"of shape {list(student_logits.shape)}."
            )
        student, target = select(mask, student_logits, labels.reshape(student_logits.shape))
        return reduce((student - target).square().mean(-1), shape, mask, reduction)

    if labels.shape != shape:
        raise ValueError(
            f"Expected argument `labels` to have shape {list(shape)}, but got {list(labels.shape)}: one label per row "
            "of logits."
        )
    labelled = labels != IGNORE_INDEX
    mask = labelled if mask is None else mask & labelled
    values = F.cross_entropy(
        full_precision(student_logits[mask]), labels[mask], reduction="none", label_smoothing=label_smoothing
    )
    return reduce(values, shape, mask, reduction)
