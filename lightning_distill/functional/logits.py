"""Other losses on the logits of student and teacher."""

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distill.functional.binary import two_logits
from lightning_distill.functional.divergences import LOG_ZERO, cosine_distance, kl, log_probabilities, top_k_kl
from lightning_distill.functional.hard_label import IGNORE_INDEX
from lightning_distill.functional.reduction import Reduction, check_same_shape, reduce, select
from lightning_distill.functional.soft_target import check_classes
from lightning_distill.functional.standardize import standardize as z_scores


def logits_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Mean squared difference of the logits of an item, the mean over classes.

    Args:
        student_logits: Shape ``[..., C]``.
        teacher_logits: Likewise.
        mask: Bool ``[...]``, the items that count; None where all do.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> functional.logits_mse(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])).item()
        2.0

    Source: Ba and Caruana, "Do Deep Nets Really Need to be Deep?", 2014.
    """
    check_same_shape(student_logits, teacher_logits, "student_logits", "teacher_logits")
    student, teacher = select(mask, student_logits, teacher_logits)
    return reduce((student - teacher).square().mean(-1), student_logits.shape[:-1], mask, reduction, num_items)


def logits_cosine(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """One minus the cosine of the angle between the logits of an item, in [0, 2].

    The size of the logits does not matter, and so no temperature; what is added to all logits of an item does.

    Args:
        student_logits: Shape ``[..., C]``.
        teacher_logits: Likewise.
        mask: Bool ``[...]``, the items that count; None where all do.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> functional.logits_cosine(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        1.0
    """
    check_same_shape(student_logits, teacher_logits, "student_logits", "teacher_logits")
    student, teacher = select(mask, student_logits, teacher_logits)
    values, _ = cosine_distance(student, teacher)
    return reduce(values, student_logits.shape[:-1], mask, reduction, num_items)


def decoupled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    standardize: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Decoupled distillation: KL of the target and of the non-target part, times the squared temperature.

    :math:`\tau^2 (\alpha \, \mathrm{KL}(b_t \| b_s) + \beta \, \mathrm{KL}(\hat p_t \| \hat p_s))`, where :math:`b`
    is the probability of the label against all others and :math:`\hat p` the prediction among the others. With two
    classes there is one other, and the second part is 0.

    Args:
        student_logits: Shape ``[..., C]``, of at least 2 classes.
        teacher_logits: Likewise.
        labels: Integer ``[...]``, a class, or -100 for an item that does not count.
        temperature: Divides both logits, above 0.
        alpha: Weight of the target part.
        beta: Weight of the non-target part.
        standardize: Whether z-scores of the logits take their place (:func:`standardize`); of at least 3 classes.
        mask: Bool ``[...]``, the items that count; None where all do that have a label.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If shapes do not fit or the temperature is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
        >>> round(functional.decoupled(student, teacher, torch.tensor([0])).item(), 4)
        1.1166

    Source: Zhao et al., "Decoupled Knowledge Distillation", 2022.
    """
    check_classes(student_logits, teacher_logits, temperature)
    if labels.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"Expected argument `labels` to have shape {list(student_logits.shape[:-1])}, but got {list(labels.shape)}."
        )
    labelled = labels != IGNORE_INDEX
    mask = labelled if mask is None else mask & labelled
    label = labels[mask].unsqueeze(-1)
    binary, others = [], []
    for logits in select(mask, student_logits, teacher_logits):
        log_p = log_probabilities(z_scores(logits) if standardize else logits, temperature)
        log_rest = log_p.scatter(-1, label, LOG_ZERO)
        log_other = log_rest.logsumexp(-1, keepdim=True)
        binary.append(torch.cat([log_p.gather(-1, label), log_other], -1))
        # The label itself stays at log 0 and adds nothing.
        others.append((log_rest - log_other).clamp(min=LOG_ZERO))
    values = alpha * kl(binary[1], binary[0]) + beta * kl(others[1], others[0])
    return reduce(temperature**2 * values, student_logits.shape[:-1], mask, reduction, num_items)


def top_k_soft_target(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_classes: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Forward KL on the teacher's k best classes and one more that stands for all others, times squared temperature.

    The k probabilities are the teacher's own, not renormalised: what is missing to 1 is the mass of the tail, and it
    is compared with the student's mass outside the k classes. It is a lower bound of the full KL divergence.

    Args:
        student_logits: Shape ``[..., C]``.
        teacher_log_probs: Shape ``[..., k]``, log-probabilities at this temperature, normalised over all C classes.
        teacher_classes: Integer ``[..., k]``, the classes they belong to, each once.
        temperature: Divides the student's logits, above 0.
        mask: Bool ``[...]``, the items that count; None where all do.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If shapes do not fit or the temperature is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> log_probs, classes = torch.tensor([[2.0, 1.0, 0.0, 0.0]]).log_softmax(-1).topk(2)
        >>> round(functional.top_k_soft_target(torch.zeros(1, 4), log_probs, classes).item(), 4)
        0.3376

    Source: the tail as one outcome is the data-processing coarsening of the KL divergence; compare Anshumann et al.,
    "Sparse Logit Sampling", 2025, on the bias of renormalising.
    """
    check_same_shape(teacher_log_probs, teacher_classes, "teacher_log_probs", "teacher_classes")
    check_classes(student_logits, student_logits, temperature)
    if teacher_classes.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"Expected argument `teacher_classes` to have shape {[*student_logits.shape[:-1], 'k']}, but got "
            f"{list(teacher_classes.shape)}."
        )
    logits, log_p = select(mask, student_logits, teacher_log_probs)
    classes = teacher_classes.flatten(0, -2) if mask is None else teacher_classes[mask]
    values, _ = top_k_kl(log_probabilities(logits, temperature), log_p, classes)
    return reduce(temperature**2 * values, student_logits.shape[:-1], mask, reduction, num_items)


Combination = Literal["logits", "probabilities"]


def combine_teachers(
    logits: list[Tensor],
    *,
    how: Combination = "logits",
    weights: list[float] | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Logits of a committee of teachers.

    Args:
        logits: One tensor ``[..., C]`` per teacher; a single logit is that of the second of two classes, or, in the
            mean of logits, a value.
        how: ``"logits"``: their mean; ``"probabilities"``: logits whose prediction at this temperature is the mean of
            the teachers' predictions at it.
        weights: One number per teacher, at least 0; they are scaled to sum to 1. Equal where None.
        temperature: Used by ``"probabilities"``, above 0.

    Returns:
        Shape ``[..., C]``, float32, or float64 for float64 logits.

    Raises:
        ValueError: If shapes differ, or the weights are not one per teacher, at least 0 and not all 0.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> teachers = [torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])]
        >>> functional.combine_teachers(teachers, weights=[1.0, 3.0]).tolist()
        [[3.0, 0.0]]
        >>> combined = functional.combine_teachers(teachers, how="probabilities")
        >>> [round(p, 3) for p in combined.softmax(-1)[0].tolist()]
        [0.741, 0.259]
    """
    if weights is None:
        weights = [1.0] * len(logits)
    if len(weights) != len(logits) or not weights or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(
            f"Expected argument `weights` to hold a number of at least 0 per teacher, not all 0, but got {weights} for "
            f"{len(logits)} teachers."
        )
    for other in logits[1:]:
        check_same_shape(logits[0], other, "logits[0]", "logits[i]")
    if how not in get_args(Combination):
        raise ValueError(f'Expected argument `how` to be "logits" or "probabilities", but got {how!r}.')
    # One logit is that of two classes, or a value: the mean of both is that of the logits.
    first = two_logits(logits[0])
    check_classes(first, first, temperature)
    shares = torch.tensor(weights, device=logits[0].device, dtype=torch.float64) / sum(weights)
    flat = torch.stack([select(None, teacher)[0] for teacher in logits])
    shares = shares.to(flat.dtype)[:, None, None]
    if how == "logits":
        return (shares * flat).sum(0).reshape(logits[0].shape)
    log_p = log_probabilities(two_logits(flat), temperature) + shares.log().clamp(min=LOG_ZERO)
    combined = temperature * log_p.logsumexp(0)
    return (combined[:, 1] - combined[:, 0] if flat.shape[-1] == 1 else combined).reshape(logits[0].shape)
