"""Losses of language models from hidden states and last linear layers, without the logits in memory."""

from typing import Literal, NamedTuple

from torch import Tensor

from lightning_distill.functional.chunked import ChunkSize, chunked_losses
from lightning_distill.functional.divergences import Divergence
from lightning_distill.functional.hard_label import IGNORE_INDEX
from lightning_distill.functional.projection import Projection
from lightning_distill.functional.reduction import check_num_items
from lightning_distill.functional.terms import CosineTerm, HardLabelTerm, SoftTargetTerm, Term


class LinearLoss(NamedTuple):
    """What :func:`linear_soft_target` returns.

    Args:
        loss: ``soft_weight * soft_target + hard_weight * hard_label``, a scalar with a gradient.
        soft_target: The divergence from the teacher, a scalar.
        hard_label: The cross entropy with the labels, a scalar, 0 without labels.
    """

    loss: Tensor
    soft_target: Tensor
    hard_label: Tensor


def linear_soft_target(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float | None = None,
    alpha: float | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    chunk_size: ChunkSize = "auto",
    ignore_index: int = IGNORE_INDEX,
    reduction: Literal["mean", "sum"] = "mean",
    num_items: float | Tensor | None = None,
) -> LinearLoss:
    r"""Soft target and hard label of a language model from hidden states, without its logits in memory.

    The same numbers as :func:`soft_target` and :func:`hard_label` on the logits of the two linear layers, computed
    chunk by chunk; the gradient is computed in the same pass, so a chunk's logits are forgotten at once. With two
    vocabularies of different sizes that share their words and differ in padding, the first words of both are compared.

    Args:
        student_hidden: Shape ``[..., D]``, what the student's last linear layer reads.
        student_weight: Shape ``[V, D]``, its weight; a tied embedding gets its gradient like any other use of it.
        teacher_hidden: Shape ``[..., E]``.
        teacher_weight: Shape ``[W, E]``.
        labels: Integer ``[...]``, a word, or ``ignore_index`` for a token that does not count. None: all count, and
            there is no hard label.
        temperature: Divides both logits in the soft target, above 0; the soft target is multiplied by its square.
        divergence: As in :func:`soft_target`.
        beta: Likewise.
        alpha: Likewise.
        soft_weight: Weight of the soft target, at least 0.
        hard_weight: Weight of the hard label, at least 0.
        label_smoothing: Share of the label that is spread evenly over the words, in [0, 1).
        student_bias: Shape ``[V]``.
        teacher_bias: Shape ``[W]``.
        student_softcap: Cap of the student's logits, as Gemma 2 has.
        teacher_softcap: Cap of the teacher's logits.
        student_logit_scale: Factor of the student's logits before the cap, as Cohere and Granite have.
        teacher_logit_scale: Factor of the teacher's logits.
        chunk_size: Tokens of a chunk; ``"auto"``: 256 on a CPU, 1024 on an accelerator.
        ignore_index: The label of a token that does not count.
        reduction: ``"mean"`` over the tokens that count, or ``"sum"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        The loss and its two parts, float32, or float64 for float64 inputs.

    Raises:
        ValueError: If shapes do not fit or an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> words = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> loss = functional.linear_soft_target(student, words, teacher, words, torch.tensor([1]), hard_weight=1.0)
        >>> round(loss.soft_target.item(), 4), round(loss.hard_label.item(), 4), round(loss.loss.item(), 4)
        (0.3278, 0.6931, 1.021)

    Source: the divergences as in :func:`soft_target`; loss and gradient in one pass over chunks as in Hsu et al.,
    "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024.
    """
    if labels is None and hard_weight:
        raise ValueError("Expected argument `labels` to be given with a `hard_weight` above 0, but got None.")
    terms: list[tuple[float, Term]] = [(soft_weight, SoftTargetTerm(temperature, divergence, beta, alpha))]
    terms += [] if labels is None else [(hard_weight, HardLabelTerm(label_smoothing))]
    mask = None if labels is None else labels != ignore_index
    losses = _reduced(
        Projection(student_hidden, student_weight, student_bias, student_softcap, student_logit_scale),
        Projection(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale),
        terms,
        labels,
        mask,
        chunk_size,
        reduction,
        num_items,
    )
    soft, hard = losses[0], losses[1] if labels is not None else losses.new_zeros(())
    return LinearLoss(soft_weight * soft + hard_weight * hard, soft.detach(), hard.detach())


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
    chunk_size: ChunkSize = "auto",
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
    return _reduced(
        Projection(student_hidden, student_weight, student_bias, student_softcap),
        Projection(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap),
        [(1.0, CosineTerm())],
        None,
        mask,
        chunk_size,
        reduction,
        num_items,
    )[0]


def _reduced(
    student: Projection,
    teacher: Projection,
    terms: list[tuple[float, Term]],
    labels: Tensor | None,
    mask: Tensor | None,
    chunk_size: ChunkSize,
    reduction: str,
    num_items: float | Tensor | None,
) -> Tensor:
    """Each term's mean or sum over the tokens that count."""
    if student.hidden.shape[:-1] != teacher.hidden.shape[:-1]:
        raise ValueError(
            "Expected arguments `student_hidden` and `teacher_hidden` to have the same tokens, but got shapes "
            f"{list(student.hidden.shape)} and {list(teacher.hidden.shape)}."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f'Expected argument `reduction` to be "mean" or "sum", but got {reduction!r}.')
    sums = chunked_losses(student, terms, teacher, labels, mask, chunk_size=chunk_size)
    if reduction == "sum":
        return sums
    if num_items is not None:
        return sums / check_num_items(num_items)
    return sums / (max(student.hidden[..., 0].numel(), 1) if mask is None else mask.sum().clamp(min=1))
