"""Distances between attention maps of student and teacher."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_distill.functional.attention import Attention
from lightning_distill.functional.divergences import LOG_ZERO, WithGradient
from lightning_distill.functional.reduction import Reduction, check_same_shape, reduce
from lightning_distill.functional.tensors import full_precision

AttentionDivergence = Literal["mse", "kl"]

# Scores computed at a time. On a CPU a block of this size stays in cache; a GPU wants more work per kernel.
_BLOCK_ELEMENTS = {"cpu": 2**19}
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
        >>> from lightning_distill.functional.attention import Attention
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
        ctx.attentions = _without_tensors(student), _without_tensors(teacher)
        ctx.divergence, ctx.mask = divergence, mask
        one = full_precision(query).new_ones(query.shape[0], query.shape[2])
        weights = one if mask is None else one * mask
        if not any(ctx.needs_input_grad):
            return _values_and_gradients(student, teacher, divergence, mask, None)[0]
        # Whoever takes a sum or a mean weighs all queries alike, and then the gradient is this one times a number.
        values, grad_query, grad_key = _values_and_gradients(student, teacher, divergence, mask, weights)
        ctx.save_for_backward(query, key, teacher.query, teacher.key, grad_query, grad_key)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, teacher_query, teacher_key, grad_query, grad_key = ctx.saved_tensors
        counted = grad.flatten() if ctx.mask is None else grad[ctx.mask]
        if counted.numel() and not bool((counted == counted[0]).all()):
            student = replace(ctx.attentions[0], query=query, key=key)
            teacher = replace(ctx.attentions[1], query=teacher_query, key=teacher_key)
            weights = grad if ctx.mask is None else grad.masked_fill(~ctx.mask, 0.0)
            _, grad_query, grad_key = _values_and_gradients(student, teacher, ctx.divergence, ctx.mask, weights)
        elif counted.numel():
            grad_query, grad_key = grad_query * counted[0], grad_key * counted[0]
        return grad_query.to(query.dtype), grad_key.to(key.dtype), None, None, None, None


def _values_and_gradients(
    student: Attention,
    teacher: Attention,
    divergence: AttentionDivergence,
    mask: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[B, T]``, and the gradient of their weighted sum for the student's queries and keys (0 where None)."""
    # What stands in padded tokens is nobody's business, not even as NaN; from here on it is 0.
    student, teacher = _at_real_tokens(student, mask), _at_real_tokens(teacher, mask)
    query, key = student.query, student.key
    num_keys = _num_keys(key.shape[0], key.shape[2], mask, key.device)
    values = query.new_zeros(query.shape[0], query.shape[2])
    grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
    for rows, queries, keys in _blocks(student, mask):
        scores, teacher_scores = student.scores(rows, queries, keys), teacher.scores(rows, queries, keys)
        values[rows, queries], gradient = _of_block(scores, teacher_scores, divergence, num_keys[rows])
        if weights is None:
            continue
        grad_scores = gradient()
        factor = student.scaling / query.shape[1] * weights[rows, None, queries, None]
        with torch.autocast(query.device.type, enabled=False):
            grad_query[rows, :, queries] = grad_scores @ key[rows, :, keys] * factor
            grad_key[rows, :, keys] += grad_scores.transpose(-1, -2) @ (query[rows, :, queries] * factor)
    return values if mask is None else values * mask, grad_query, grad_key


def _of_block(scores: Tensor, teacher_scores: Tensor, divergence: str, num_keys: Tensor) -> WithGradient:
    """Values ``[rows, queries]`` of a block, and the gradient at ``scores``, but for the mean over heads."""
    same_heads = scores.shape[1] == teacher_scores.shape[1]
    if divergence == "kl" and same_heads:
        log_s, log_t = (x.log_softmax(-1).clamp_(min=LOG_ZERO) for x in (scores, teacher_scores))
        s, t = log_s.exp(), log_t.exp()
        # Keys that the student cannot see are constants, whatever the teacher thinks of them.
        unseen = torch.finfo(scores.dtype).min
        values = (t * log_t.sub_(log_s)).sum(-1).mean(1)
        return values, lambda: (s - t).masked_fill_(scores == unseen, 0.0)
    s, t = scores.softmax(-1), teacher_scores.softmax(-1)
    p, r = (s, t) if same_heads else (s.mean(1, keepdim=True), t.mean(1, keepdim=True))
    if divergence == "mse":
        difference = p - r
        values, grad_p = difference.square().sum(-1).mean(1) / num_keys, difference.mul_(2 / num_keys[:, None, :, None])
    else:
        p = p.clamp(min=torch.finfo(s.dtype).tiny)
        values, grad_p = (torch.xlogy(r, r) - r * p.log()).sum(-1).mean(1), -r / p
    return values, lambda: torch.ops.aten._softmax_backward_data(grad_p.expand_as(s), s, -1, s.dtype)


def _without_tensors(attention: Attention) -> Attention:
    """The attention without what autograd saves for the backward anyway, and without the values, which are not read."""
    nothing = attention.query.new_empty(0)
    return replace(attention, query=nothing, key=nothing, value=nothing)


def _at_real_tokens(attention: Attention, mask: Tensor | None) -> Attention:
    query, key = full_precision(attention.query), full_precision(attention.key)
    if mask is not None:
        padded = ~mask[:, None, :, None]
        query = query.masked_fill(padded, 0.0)
        key = key.masked_fill(padded, 0.0) if key.shape[2] == mask.shape[1] else key
    return replace(attention, query=query, key=key)


def _blocks(attention: Attention, mask: Tensor | None) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of rows, queries and keys whose scores fit the budget together, and that hold all real tokens."""
    rows, heads, queries, _ = attention.query.shape
    keys, device = attention.key.shape[2], attention.query.device.type
    budget = _BLOCK_ELEMENTS.get(device, _BLOCK_ELEMENTS_ELSEWHERE)
    row_step = max(1, budget // (heads * queries * keys))
    for row in range(0, rows, row_step):
        begin, end = 0, queries
        # Elsewhere the look at the mask would make the device wait.
        if mask is not None and device == "cpu":
            real = mask[row : row + row_step].any(0).nonzero()
            begin, end = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
        of_keys = slice(begin, end) if keys == queries else slice(None)
        width = end - begin if keys == queries else keys
        query_step = max(1, budget // max(1, heads * width))
        for query in range(begin, end, query_step):
            yield slice(row, row + row_step), slice(query, min(query + query_step, end)), of_keys


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
