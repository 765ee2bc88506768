"""Distances between attention maps of student and teacher."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_distill.attention import Attention
from lightning_distill.functional.reduction import Reduction, check_same_shape, full_precision, reduce
from lightning_distill.functional.soft_target import LOG_ZERO

AttentionDivergence = Literal["mse", "kl"]

# Scores computed at a time. On a CPU a block of this size stays in cache; a GPU wants more work per kernel.
_BLOCK_ELEMENTS = {"cpu": 2**20}
_BLOCK_ELEMENTS_ELSEWHERE = 2**25


def attention_map(
    student: Tensor,
    teacher: Tensor,
    *,
    divergence: AttentionDivergence = "mse",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Difference of two attention maps, a mean over the heads, of a query.

    With rows :math:`A_s, A_t` of a query over :math:`n` real keys:

    - ``"mse"``: :math:`\frac{1}{n} \lVert A_s - A_t \rVert^2`. Padding does not count as keys, so the value of a
      sentence does not depend on how far its batch is padded;
    - ``"kl"``: :math:`\mathrm{KL}(A_t \| A_s)`.

    Args:
        student: Probabilities ``[B, H, T, S]``, 0 at padded keys.
        teacher: Likewise.
        divergence: ``"mse"`` or ``"kl"``.
        mask: Bool ``[B, T]``, the real tokens; None where all are. Keys are taken to be the same tokens if T = S.
        reduction: ``"mean"`` over the queries that count, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B, T]`` with ``reduction="none"``; float32, or float64 for float64 maps.

    Raises:
        ValueError: If shapes differ or there is no such divergence.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[1.0, 0.0]]]])
        >>> functional.attention_map(student, teacher).item()
        0.25
        >>> round(functional.attention_map(student, teacher, divergence="kl").item(), 4)
        0.6931

    Source: Jiao et al., "TinyBERT", 2020 (MSE, there on the scores before the softmax); Wang et al., "MiniLM", 2020
    (KL).
    """
    check_same_shape(student, teacher, "student", "teacher")
    _check_divergence(divergence)
    s, t = full_precision(student), full_precision(teacher)
    if mask is not None:
        s, t = (x.masked_fill(~mask[:, None, :, None], 0.0) for x in (s, t))
    if divergence == "mse":
        values = (s - t).square().sum(-1).mean(1) / _num_keys(s.shape[0], s.shape[3], mask, s.device)
    else:
        tiny = torch.finfo(s.dtype).tiny
        values = (torch.xlogy(t, t) - t * s.clamp(min=tiny).log()).sum(-1).mean(1)
    return _reduce(values, mask, reduction)


def attention_divergence(
    student: Attention,
    teacher: Attention,
    *,
    divergence: AttentionDivergence = "mse",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The same as :func:`attention_map`, from queries and keys, without a map in memory.

    Maps are computed block by block of queries, in the forward and again in the backward, so memory grows with the
    length and not with its square. The teacher is a constant: no gradient reaches it. Where student and teacher differ
    in heads, the mean map over the heads of each is compared.

    Args:
        student: Queries and keys of a student layer.
        teacher: Queries and keys of a teacher layer, of the same tokens.
        divergence: ``"mse"`` or ``"kl"``.
        mask: Bool ``[B, T]``, the real tokens; None where all are.
        reduction: ``"mean"`` over the queries that count, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B, T]`` with ``reduction="none"``; float32, or float64 for float64 queries.

    Raises:
        ValueError: If student and teacher have other tokens or there is no such divergence.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> from lightning_distill.attention import Attention
        >>> q, k = torch.randn(2, 1, 2, 6, 4).unbind(0)
        >>> student = Attention(q, k, k, mask=None, scaling=0.5, is_causal=True)
        >>> teacher = Attention(k, q, q, mask=None, scaling=0.5, is_causal=True)
        >>> blocks = functional.attention_divergence(student, teacher)
        >>> maps = functional.attention_map(student.probabilities(), teacher.probabilities())
        >>> round((blocks - maps).abs().item(), 6)
        0.0
    """
    _check_divergence(divergence)
    for one, other, what in (
        (student.query, teacher.query, "student.query"),
        (student.key, teacher.key, "student.key"),
    ):
        check_same_shape(one[:, 0, :, 0], other[:, 0, :, 0], what, what.replace("student", "teacher"))
    if student.position_bias is not None and student.position_bias.requires_grad:
        # A learned bias gets a gradient too, which the blocks do not compute.
        maps = [student.probabilities(), teacher.probabilities()]
        if maps[0].shape[1] != maps[1].shape[1]:
            maps = [x.mean(1, keepdim=True) for x in maps]
        return attention_map(maps[0], maps[1], divergence=divergence, mask=mask, reduction=reduction)
    values = _Blocks.apply(student.query, student.key, student, teacher, divergence, mask)
    return _reduce(values, mask, reduction)


class _Blocks(torch.autograd.Function):
    """Values ``[B, T]`` and their gradient with respect to the student's queries and keys."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        student: Attention,
        teacher: Attention,
        divergence: AttentionDivergence,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, teacher.query, teacher.key)
        ctx.attentions, ctx.divergence, ctx.mask = (
            (_without_tensors(student), _without_tensors(teacher)),
            divergence,
            mask,
        )
        values = full_precision(query).new_zeros(query.shape[0], query.shape[2])
        num_keys = _num_keys(key.shape[0], key.shape[2], mask, key.device)
        same_heads = query.shape[1] == teacher.query.shape[1]
        for rows, queries in _blocks(student):
            s, t = student.scores(rows, queries), teacher.scores(rows, queries)
            if divergence == "kl" and same_heads:
                log_s, log_t = (x.log_softmax(-1).clamp_(min=LOG_ZERO) for x in (s, t))
                values[rows, queries] = log_t.exp().mul_(log_t.sub_(log_s)).sum(-1).mean(1)
                continue
            s, t = s.softmax(-1), t.softmax(-1)
            if not same_heads:
                s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
            if divergence == "mse":
                values[rows, queries] = (s - t).square_().sum(-1).mean(1) / num_keys[rows]
            else:
                tiny = torch.finfo(s.dtype).tiny
                values[rows, queries] = (torch.xlogy(t, t) - t * s.clamp(min=tiny).log()).sum(-1).mean(1)
        # What stands in padded queries is nobody's business, not even as NaN.
        return values if mask is None else values.masked_fill(~mask, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, teacher_query, teacher_key = ctx.saved_tensors
        student = replace(ctx.attentions[0], query=query, key=key)
        teacher = replace(ctx.attentions[1], query=teacher_query, key=teacher_key)
        if ctx.mask is not None:
            grad = grad.masked_fill(~ctx.mask, 0.0)
        grad_query, grad_key = (torch.zeros_like(full_precision(x)) for x in (query, key))
        num_keys = _num_keys(key.shape[0], key.shape[2], ctx.mask, key.device)
        heads, same_heads = query.shape[1], query.shape[1] == teacher_query.shape[1]
        for rows, queries in _blocks(student):
            scores = student.scores(rows, queries)
            s, t = scores.softmax(-1), teacher.scores(rows, queries).softmax(-1)
            factor = grad[rows, None, queries, None] / heads
            if ctx.divergence == "kl" and same_heads:
                # Keys that the student cannot see are constants, whatever the teacher thinks of them.
                grad_scores = (s - t).mul_(factor).masked_fill_(scores == torch.finfo(scores.dtype).min, 0.0)
            else:
                mean_s, mean_t = (s, t) if same_heads else (s.mean(1, keepdim=True), t.mean(1, keepdim=True))
                if ctx.divergence == "mse":
                    grad_s = (mean_s - mean_t) * (2 * factor / num_keys[rows][:, None, :, None])
                else:
                    grad_s = mean_t / mean_s.clamp(min=torch.finfo(s.dtype).tiny) * -factor
                grad_scores = s * (grad_s - (s * grad_s).sum(-1, keepdim=True))
            if ctx.mask is not None:
                # A factor of 0 is not enough where a padded token holds NaN.
                grad_scores.masked_fill_(~ctx.mask[rows, None, queries, None], 0.0)
            with torch.autocast(query.device.type, enabled=False):
                grad_query[rows, :, queries] = grad_scores @ full_precision(key[rows]) * student.scaling
                grad_key[rows] += (
                    grad_scores.transpose(-1, -2) @ full_precision(query[rows, :, queries]) * student.scaling
                )
        if ctx.mask is not None:
            padded = ~ctx.mask[:, None, :, None]
            grad_query.masked_fill_(padded, 0.0)
            if key.shape[2] == query.shape[2]:
                grad_key.masked_fill_(padded, 0.0)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), None, None, None, None


def _without_tensors(attention: Attention) -> Attention:
    """The attention without what autograd saves for the backward anyway, and without the values, which are not read."""
    nothing = attention.query.new_empty(0)
    return replace(attention, query=nothing, key=nothing, value=nothing)


def _blocks(attention: Attention) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and of queries whose scores fit the budget together."""
    rows, heads, queries, _ = attention.query.shape
    budget = _BLOCK_ELEMENTS.get(attention.query.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    per_query = heads * attention.key.shape[2]
    query_step = min(queries, max(1, budget // per_query))
    row_step = max(1, budget // (per_query * queries))
    for row in range(0, rows, row_step):
        for query in range(0, queries, query_step):
            yield slice(row, row + row_step), slice(query, query + query_step)


def _num_keys(batch: int, keys: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """Number of real keys of each row, shape ``[B, 1]``."""
    if mask is not None and mask.shape[1] == keys:
        return mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.full((batch, 1), keys, device=device)


def _check_divergence(divergence: str) -> None:
    if divergence not in ("mse", "kl"):
        raise ValueError(f'Expected argument `divergence` to be "mse" or "kl", but got {divergence!r}.')


def _reduce(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    counted = values.flatten() if mask is None else values[mask]
    return reduce(counted, values.shape, mask, reduction)
