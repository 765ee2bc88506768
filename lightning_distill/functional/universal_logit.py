"""The distance between predictions over different vocabularies."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.functional.reduction import Reduction, reduce, select


def universal_logit(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Universal logit distillation: the distance between two predictions whose classes have nothing in common.

    :math:`\sum_i |q_{(i)} - p_{(i)}|` of the probabilities sorted from the largest to the smallest, those of the
    smaller vocabulary followed by zeros. It is the Wasserstein distance with equal cost between any two words: in
    [0, 2], and 0 for predictions that are equally sure, whatever they are sure of. Beside it, a hard label says which
    words are meant.

    Args:
        student_logits: Shape ``[..., C]``.
        teacher_logits: Shape ``[..., D]``.
        mask: Bool ``[...]``, the items that count; None where all do.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If the items differ in number.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[-100.0, -100.0, 0.0, -100.0]])
        >>> functional.universal_logit(student, teacher).item()
        1.0

    Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    2024.
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            "Expected arguments `student_logits` and `teacher_logits` to have the same items, but got shapes "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}."
        )
    student, teacher = (
        torch.softmax(logits, -1).sort(-1, descending=True).values
        for logits in select(mask, student_logits, teacher_logits)
    )
    words = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (F.pad(x, (0, words - x.shape[-1])) for x in (student, teacher))
    return reduce((student - teacher).abs().sum(-1), student_logits.shape[:-1], mask, reduction, num_items)
