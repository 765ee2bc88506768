"""The cosine of logits over a vocabulary that never holds the logits of more than one chunk of tokens."""

from typing import Literal

from torch import Tensor

from lightning_distill.functional.chunked import linear_losses
from lightning_distill.functional.projection import Projection
from lightning_distill.functional.reduction import check_num_items


def linear_cosine(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    mask: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_size: int | Literal["auto"] = "auto",
    reduction: Literal["mean", "sum"] = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """One minus the cosine of two language models' logits from hidden states, without the logits in memory.

    The same number as :func:`logits_cosine` on the logits of the two linear layers, computed chunk by chunk with its
    gradient in the same pass. With two vocabularies of different sizes that share their words and differ in padding,
    the first words of both are compared. A factor of all logits changes nothing unless they are capped after it.

    Args:
        student_hidden: Shape ``[..., D]``, what the student's last linear layer reads.
        student_weight: Shape ``[V, D]``, its weight.
        teacher_hidden: Shape ``[..., E]``.
        teacher_weight: Shape ``[W, E]``.
        mask: Bool ``[...]``, the tokens that count; None where all do.
        student_bias: Shape ``[V]``.
        teacher_bias: Shape ``[W]``.
        student_softcap: Cap of the student's logits, as Gemma 2 has.
        teacher_softcap: Cap of the teacher's logits.
        chunk_size: Tokens of a chunk; ``"auto"``: 256 on a CPU, 1024 on an accelerator.
        reduction: ``"mean"`` over the tokens that count, or ``"sum"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        A scalar, float32, or float64 for float64 inputs.

    Raises:
        ValueError: If shapes do not fit or an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher, words = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.eye(2)
        >>> functional.linear_cosine(student, words, teacher, words).item()
        1.0

    Source: loss and gradient in one pass over chunks as in Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM
    Training", 2024.
    """
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "Expected arguments `student_hidden` and `teacher_hidden` to have the same tokens, but got shapes "
            f"{list(student_hidden.shape)} and {list(teacher_hidden.shape)}."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f'Expected argument `reduction` to be "mean" or "sum", but got {reduction!r}.')
    loss = linear_losses(
        Projection(student_hidden, student_weight, student_bias, student_softcap),
        Projection(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap),
        None,
        mask,
        divergence="cosine",
        weights=(1.0, 0.0),
        chunk_size=chunk_size,
    )[0]
    if reduction == "sum":
        return loss
    if num_items is not None:
        return loss / check_num_items(num_items)
    return loss / (max(student_hidden[..., 0].numel(), 1) if mask is None else mask.sum().clamp(min=1))
