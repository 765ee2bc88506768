"""Self-attention relations of MiniLM and MiniLMv2."""

from torch import Tensor

from lightning_distill.functional.attention import Attention
from lightning_distill.functional.attention_map import attention_divergence
from lightning_distill.functional.reduction import Reduction


def relation(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    relation_heads: int,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KL divergence of the teacher's relation between two kinds of vectors from the student's, of a token.

    The heads of each are joined and split again into relation heads of width :math:`d`; the relation of
    :math:`A` and :math:`B` is :math:`\mathrm{softmax}(A B^\top / \sqrt{d})`. So student and teacher may differ in heads
    and width. The value is a mean over relation heads.

    Args:
        student: Two tensors ``[B, H, T, D]``: queries twice for Q-Q, keys twice for K-K, values twice for V-V, queries
            and keys for Q-K.
        teacher: Likewise, with its own heads and width.
        relation_heads: Number of relation heads; divides ``H * D`` of both.
        mask: Bool ``[B, T]``, the real tokens; None where all are.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B, T]`` with ``reduction="none"``; float32, or float64 for float64 tensors.

    Raises:
        ValueError: If the relation heads do not divide, or the tokens differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.randn(2, 4, 7, 8), torch.randn(2, 12, 7, 8)
        >>> functional.relation((student, student), (teacher, teacher), relation_heads=4, reduction="none").shape
        torch.Size([2, 7])

    Source: Wang et al., "MiniLM", 2020; Wang et al., "MiniLMv2", 2021.
    """
    attentions = []
    for role, (first, second) in (("student", student), ("teacher", teacher)):
        first, second = (_split(x, relation_heads, role) for x in (first, second))
        keys = None if mask is None else mask[:, None, None, :]
        attentions.append(Attention(first, second, second, keys, first.shape[-1] ** -0.5, is_causal=False))
    return attention_divergence(attentions[0], attentions[1], divergence="kl", mask=mask, reduction=reduction)


def _split(x: Tensor, relation_heads: int, role: str) -> Tensor:
    batch, heads, tokens, width = x.shape
    if relation_heads < 1 or heads * width % relation_heads:
        raise ValueError(
            f"Expected argument `relation_heads` to divide the {role}'s {heads} heads of width {width}, "
            f"{heads * width} together, but got {relation_heads}."
        )
    return x.transpose(1, 2).reshape(batch, tokens, relation_heads, -1).transpose(1, 2)
