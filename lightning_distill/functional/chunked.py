"""Losses on a vocabulary that never hold the logits of more than one chunk of tokens."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_distill.functional.gradients import Options, block_losses
from lightning_distill.functional.hard_label import IGNORE_INDEX
from lightning_distill.functional.projection import Projection, TopK
from lightning_distill.functional.reduction import check_num_items, full_precision
from lightning_distill.functional.soft_target import Divergence, beside_limits, check_shares

# Tokens of a chunk. A chunk must be long enough for the gradient of the weight, which every chunk reads and writes
# once, to cost little beside the matrix products, and short enough for two chunks of logits to be small.
_CHUNK = {"cpu": 256, "cuda": 1024}
# What a CPU works through at a time inside a chunk: as many logits as stay in its cache with their temporaries.
_BLOCK = 2**18


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
    beta: float = 0.5,
    alpha: float = 0.1,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    chunk_size: int | Literal["auto"] = "auto",
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
        beta: Weight of the teacher in the mixture of ``"js"``, in [0, 1].
        alpha: Share that the skewed divergences mix in, in (0, 1).
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
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "Expected arguments `student_hidden` and `teacher_hidden` to have the same tokens, but got shapes "
            f"{list(student_hidden.shape)} and {list(teacher_hidden.shape)}."
        )
    if divergence not in get_args(Divergence):
        raise ValueError(f"Expected argument `divergence` to be one of {get_args(Divergence)}, but got {divergence!r}.")
    if labels is None and hard_weight:
        raise ValueError("Expected argument `labels` to be given with a `hard_weight` above 0, but got None.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'Expected argument `reduction` to be "mean" or "sum", but got {reduction!r}.')
    mask = None if labels is None else labels != ignore_index
    soft, hard = linear_losses(
        Projection(student_hidden, student_weight, student_bias, student_softcap, student_logit_scale),
        Projection(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale),
        labels,
        mask,
        temperature=temperature,
        divergence=divergence,
        share=beta if divergence == "js" else alpha,
        label_smoothing=label_smoothing,
        weights=(soft_weight, hard_weight),
        chunk_size=chunk_size,
    )
    if reduction == "mean":
        count: Any = student_hidden[..., 0].numel() if mask is None else mask.sum().clamp(min=1)
        count = count if num_items is None else check_num_items(num_items)
        soft, hard = soft / count, hard / count
    return LinearLoss(soft_weight * soft + hard_weight * hard, soft.detach(), hard.detach())


def linear_losses(
    student: Projection,
    teacher: Projection | TopK | Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    share: float = 0.5,
    label_smoothing: float = 0.0,
    weights: tuple[float, float] = (1.0, 1.0),
    words: int | None = None,
    chunk_size: int | Literal["auto"] = "auto",
) -> Tensor:
    """Sums of soft target and hard label over the tokens that count.

    The gradient is computed with the losses, for a total in which they have these weights. Where backward then asks
    for others (a balance between losses, say) it is exact too, and costs a second pass.

    Args:
        student: What the student predicts from.
        teacher: What the teacher predicts from, its logits ``[..., W]``, its k best words, or None for no soft target.
        labels: Integer ``[...]``, or None for no hard label. A token that counts must have one.
        mask: Bool ``[...]``, the tokens that count; None where all do.
        temperature: Divides both logits, above 0.
        divergence: Name of the divergence, or ``"cosine"``; with k best words, ``"forward_kl"`` alone.
        share: The divergence's ``beta`` or ``alpha``, in (0, 1).
        label_smoothing: In [0, 1).
        weights: Of soft target and hard label in the total.
        words: How many of the student's words there are, where the last ones are padding; None for all of them, or as
            many as the teacher has.
        chunk_size: Tokens of a chunk, at least 1, or ``"auto"``.

    Returns:
        Shape ``[2]``, float32, or float64 for float64 inputs; 0 for the one that is not asked for.

    Raises:
        ValueError: If an argument is out of its range.
    """
    _check(temperature, divergence, share, label_smoothing, chunk_size, teacher)
    divergence, share = beside_limits(divergence, share)
    items: Any = slice(None) if mask is None else mask
    student = student.take(items)
    hidden = student.hidden.flatten(0, -2)
    teacher = None if teacher is None else _flat(teacher[items] if isinstance(teacher, Tensor) else teacher.take(items))
    labels = None if labels is None else labels[items].flatten()
    options = Options(temperature, divergence, share, label_smoothing, student.scale, student.softcap)
    size = _CHUNK.get(hidden.device.type, _CHUNK["cuda"]) if chunk_size == "auto" else chunk_size
    weighted = (float(teacher is not None) * weights[0], float(labels is not None) * weights[1])
    words = min(_shared_words(student.weight, teacher), words or len(student.weight))
    if labels is not None:
        _check_labels(labels, words, len(student.weight))
    sums: Tensor = _LinearLosses.apply(
        hidden, student.weight, student.bias, teacher, labels, options, weighted, words, size
    )
    return sums


def _flat(teacher: Projection | TopK | Tensor) -> Projection | TopK | Tensor:
    if isinstance(teacher, Tensor):
        return teacher.flatten(0, -2)
    if isinstance(teacher, TopK):
        return TopK(teacher.log_probs.flatten(0, -2), teacher.classes.flatten(0, -2))
    return Projection(teacher.hidden.flatten(0, -2), teacher.weight, teacher.bias, teacher.softcap, teacher.scale)


def _check(
    temperature: float, divergence: str, share: float, label_smoothing: float, chunk_size: object, teacher: object
) -> None:
    allowed = (*get_args(Divergence), "cosine") if not isinstance(teacher, TopK) else ("forward_kl",)
    if divergence not in allowed:
        raise ValueError(f"Expected argument `divergence` to be one of {allowed}, but got {divergence!r}.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"Expected argument `temperature` to be finite and above 0, but got {temperature}.")
    if divergence == "js":
        check_shares(share, 0.5)
    else:
        check_shares(0.5, share)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"Expected argument `label_smoothing` to be in [0, 1), but got {label_smoothing}.")
    if chunk_size != "auto" and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise ValueError(f'Expected argument `chunk_size` to be "auto" or at least 1, but got {chunk_size!r}.')


def _check_labels(labels: Tensor, words: int, own: int) -> None:
    if not labels.numel():
        return
    # The device waits once; without it the gather would stop the whole program there.
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    if lowest < 0 or highest >= words:
        wrong = lowest if lowest < 0 else highest
        beyond = ", which is a word of the student's that the teacher does not have" if 0 <= wrong < own else ""
        raise ValueError(
            f"Expected argument `labels` to be below {words}, the words that student and teacher share, but got "
            f"{wrong}{beyond}. Give such tokens the label `ignore_index`, or leave the teacher out for them."
        )


class _LinearLosses(torch.autograd.Function):
    """Sums of both losses; their gradient is ready when they are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Projection | TopK | Tensor | None,
        labels: Tensor | None,
        options: Options,
        weights: tuple[float, float],
        words: int,
        size: int,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:3]
        # Under autocast a linear layer computes in another type than its inputs have; so do the chunks here.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ctx.again = functools.partial(
            _chunks, teacher=teacher, labels=labels, options=options, words=words, size=size, dtype=dtype
        )
        ctx.save_for_backward(hidden, weight, bias)
        ctx.weights = weights
        sums, gradients = ctx.again(hidden, weight, bias, weights=weights, needed=needed)
        ctx.gradients = gradients
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        expected = upstream.new_tensor(ctx.weights)
        scale = (upstream * expected).sum() / (expected * expected).sum().clamp(min=torch.finfo(expected.dtype).tiny)
        # One look at two numbers, which makes the device wait once; without it a total with other weights than those
        # that were announced would silently have a wrong gradient.
        active = upstream.new_tensor([ctx.again.keywords[name] is not None for name in ("teacher", "labels")])
        # Scaled in place: a copy of the weight's gradient is what this function is here to avoid.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or not torch.allclose(scale * expected, upstream * active, rtol=1e-5, atol=0.0):
            asked = tuple(upstream.tolist())
            _, gradients = ctx.again(hidden, weight, bias, weights=asked, needed=ctx.needs_input_grad[:3])
            scale = upstream.new_ones(())
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(of.dtype)
            for gradient, of in zip(gradients, (hidden, weight, bias), strict=True)
        ]
        return (*scaled, *(None,) * 6)


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    teacher: Projection | TopK | Tensor | None,
    labels: Tensor | None,
    options: Options,
    weights: tuple[float, float],
    needed: tuple[bool, bool, bool],
    words: int,
    size: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Sums ``[2]`` of the losses and the gradients of hidden states, weight and bias."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    sums = torch.zeros(2, dtype=exact, device=hidden.device)
    shapes = [
        of.shape if need and of is not None else None for of, need in zip((hidden, weight, bias), needed, strict=True)
    ]
    gradients = [None if shape is None else torch.empty(shape, dtype=exact, device=hidden.device) for shape in shapes]
    for gradient in gradients[1:]:
        if gradient is not None:
            # The first chunk writes the rest: zeros there would be one more pass over the largest tensor there is.
            gradient[words if len(hidden) else 0 :].zero_()
    cast: Callable[[Tensor], Tensor] = (lambda x: x) if dtype is None else (lambda x: x.to(dtype))
    with torch.autocast(hidden.device.type, enabled=False):
        own = Projection(cast(hidden), cast(weight[:words]), None if bias is None else cast(bias[:words]), None, 1.0)
        if isinstance(teacher, Projection):
            teacher = Projection(
                cast(teacher.hidden),
                cast(teacher.weight[:words]),
                None if teacher.bias is None else cast(teacher.bias[:words]),
                teacher.softcap,
                teacher.scale,
            )
        rows = min(size, len(hidden))
        own_room, teacher_room = (
            torch.empty(rows if used else 0, words, dtype=exact, device=hidden.device)
            for used in (True, isinstance(teacher, Projection))
        )
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            count = len(hidden[chunk])
            logits = own.take(chunk).write_logits(own_room[:count])
            beside = _rows_of(teacher, chunk, words, teacher_room[:count])
            chunk_labels = None if labels is None else labels[chunk]
            values, slope = _losses(logits, beside, chunk_labels, options, weights, any(needed))
            sums += values
            if any(needed):
                _accumulate(gradients, chunk, slope.to(own.hidden.dtype), own, words)
    return sums, gradients


def _shared_words(weight: Tensor, teacher: Projection | TopK | Tensor | None) -> int:
    if teacher is None or isinstance(teacher, TopK):
        return len(weight)
    return min(len(weight), teacher.shape[-1] if isinstance(teacher, Tensor) else len(teacher.weight))


def _rows_of(
    teacher: Projection | TopK | Tensor | None, chunk: slice, words: int, room: Tensor
) -> Tensor | TopK | None:
    if teacher is None:
        return None
    if isinstance(teacher, Tensor):
        return full_precision(teacher[chunk, :words])
    part = teacher.take(chunk)
    return part if isinstance(part, TopK) else part.write_logits(room)


def _accumulate(gradients: list[Tensor | None], chunk: slice, slope: Tensor, own: Projection, words: int) -> None:
    """Add a chunk's share to the gradients, in float32 whatever the inputs are."""
    of_hidden, of_weight, of_bias = gradients
    hidden, kept = own.hidden[chunk], float(chunk.start > 0)
    if of_hidden is not None:
        of_hidden[chunk] = slope @ own.weight
    if of_weight is not None:
        if slope.dtype == of_weight.dtype:
            of_weight[:words].addmm_(slope.T, hidden, beta=kept)
        elif kept:
            of_weight[:words] += slope.T @ hidden
        else:
            of_weight[:words] = slope.T @ hidden
    if of_bias is not None:
        shares = slope.sum(0, dtype=of_bias.dtype)
        of_bias[:words] = of_bias[:words] + shares if kept else shares


def _losses(
    logits: Tensor,
    teacher: Tensor | TopK | None,
    labels: Tensor | None,
    options: Options,
    weights: tuple[float, float],
    with_slope: bool,
) -> tuple[Tensor, Tensor]:
    """Sums ``[2]`` of a chunk and the slope of the weighted total at its raw logits, which is written over them."""
    compute: Callable[..., tuple[Tensor, Tensor]] = block_losses if logits.device.type == "cpu" else _compiled_block()
    rows = max(1, _BLOCK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    sums = logits.new_zeros(2)
    for start in range(0, len(logits), rows):
        block = slice(start, start + rows)
        of_teacher = teacher.take(block) if isinstance(teacher, TopK) else None if teacher is None else teacher[block]
        values, slope = compute(
            logits[block],
            of_teacher,
            None if labels is None else labels[block],
            options,
            weights,
            with_slope,
        )
        sums += values
        if with_slope:
            logits[block] = slope
    return sums, logits


@functools.cache
def _compiled_block() -> Callable[..., tuple[Tensor, Tensor]]:
    # A last chunk that is shorter than the others must not compile anew for every length.
    return torch.compile(block_losses, dynamic=True)
