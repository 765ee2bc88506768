"""Losses over a vocabulary in one pass over a model's last layer, with the logits of one chunk of tokens in memory."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_distill.functional.projection import Projection, TopK
from lightning_distill.functional.tensors import full_precision
from lightning_distill.functional.terms import Chunk, Term

# Tokens of a chunk. A chunk must be long enough for the gradient of the weight, which every chunk reads and writes
# once, to cost little beside the matrix products, and short enough for two chunks of logits to be small.
_CHUNK = {"cpu": 256, "cuda": 1024}
# What a CPU works through at a time inside a chunk: as many logits as stay in its cache with their temporaries.
_BLOCK = 2**18

#: What a teacher predicts from, its logits ``[..., W]``, its k best words by temperature, or None for no teacher.
Teacher: TypeAlias = Projection | Tensor | Mapping[float, TopK] | None
ChunkSize: TypeAlias = int | Literal["auto"]


def chunked_losses(
    student: Projection,
    terms: Sequence[tuple[float, Term]],
    teacher: Teacher = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    vocab_size: int | None = None,
    chunk_size: ChunkSize = "auto",
) -> Tensor:
    """Sums of losses over the tokens that count.

    The gradient is computed with the losses, for a total in which they have these weights. Where backward then asks
    for others (a balance between losses, say) it is exact too, and costs a second pass.

    Args:
        student: What the student predicts from.
        terms: Each loss with its weight in the total.
        teacher: What the teacher predicts from, or what it predicts.
        labels: Integer ``[...]``, or None where no term reads them. A token that counts must have one.
        mask: Bool ``[...]``, the tokens that count; None where all do.
        vocab_size: How many of the student's words there are, where the last ones are padding; None for all of them,
            or as many as the teacher has.
        chunk_size: Tokens of a chunk, at least 1; ``"auto"``: 256 on a CPU, 1024 on an accelerator.

    Returns:
        Shape ``[terms]``, float32, or float64 for float64 inputs.

    Raises:
        ValueError: If the chunk size or a label is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill.functional.chunked import chunked_losses
        >>> from lightning_distill.functional.projection import Projection
        >>> from lightning_distill.functional.terms import SoftTargetTerm
        >>> terms = [(0.5, SoftTargetTerm(1.0)), (0.5, SoftTargetTerm(2.0))]
        >>> hidden = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> losses = chunked_losses(Projection(hidden, torch.eye(2)), terms, teacher=torch.zeros(1, 2))
        >>> losses.detach(), torch.autograd.grad(0.5 * losses.sum(), hidden)
        (tensor([0.4338, 0.4805]), (tensor([[ 0.4215, -0.4215]]),))
    """
    if chunk_size != "auto" and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise ValueError(f'Expected argument `chunk_size` to be "auto" or at least 1, but got {chunk_size!r}.')
    student, teacher = _counted(student, mask), _of_teacher(teacher, lambda part: _counted(part, mask))
    labels = None if labels is None else (labels if mask is None else labels[mask]).flatten()
    vocab_size = min(_shared_vocab_size(student.weight, teacher), vocab_size or len(student.weight))
    if labels is not None:
        _check_labels(labels, vocab_size, len(student.weight))
    # Under autocast a linear layer computes in another type than its inputs have; so do the chunks here.
    device = student.hidden.device.type
    head_pass = _HeadPass(
        terms=tuple(term for _, term in terms),
        teacher=teacher,
        labels=labels,
        scale=student.scale,
        softcap=student.softcap,
        vocab_size=vocab_size,
        size=_CHUNK.get(device, _CHUNK["cuda"]) if chunk_size == "auto" else chunk_size,
        dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )
    weights = tuple(weight for weight, _ in terms)
    sums: Tensor = _ChunkedLosses.apply(student.hidden, student.weight, student.bias, head_pass, weights)
    return sums


def _counted(part: Any, mask: Tensor | None) -> Any:
    """Of a projection, logits or the best words, the tokens that count, in one row."""
    if mask is not None:
        return part[mask] if isinstance(part, Tensor) else part.take(mask)
    return part.flatten(0, -2) if isinstance(part, Tensor) else part.flat()


def _of_teacher(teacher: Any, take: Callable[[Any], Any]) -> Any:
    """What a function makes of each thing that stands for a teacher."""
    if isinstance(teacher, Mapping):
        return {temperature: take(best) for temperature, best in teacher.items()}
    return None if teacher is None else take(teacher)


def _shared_vocab_size(weight: Tensor, teacher: Teacher) -> int:
    if isinstance(teacher, Tensor):
        return min(len(weight), teacher.shape[-1])
    return min(len(weight), len(teacher.weight)) if isinstance(teacher, Projection) else len(weight)


def _check_labels(labels: Tensor, vocab_size: int, own: int) -> None:
    if not labels.numel():
        return
    # The device waits once; without it the gather would stop the whole program there.
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        beyond = ", which is a word of the student's that the teacher does not have" if 0 <= wrong < own else ""
        raise ValueError(
            f"Expected argument `labels` to be below {vocab_size}, the words that student and teacher share, but got "
            f"{wrong}{beyond}. Give such tokens the label `ignore_index`, or leave the teacher out for them."
        )


class _ChunkedLosses(torch.autograd.Function):
    """Sums of the terms; their gradient is ready when they are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head_pass: "_HeadPass",
        weights: tuple[float, ...],
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head_pass, ctx.weights = head_pass, weights
        sums, ctx.gradients = head_pass.run((hidden, weight, bias), weights, ctx.needs_input_grad[:3])
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        inputs = ctx.saved_tensors
        expected = upstream.new_tensor(ctx.weights)
        scale = (upstream * expected).sum() / (expected * expected).sum().clamp(min=torch.finfo(expected.dtype).tiny)
        # Scaled in place: a copy of the weight's gradient is what this function is here to avoid.
        gradients, ctx.gradients = ctx.gradients, None
        # One look at a few numbers, which makes the device wait once; without it a total with other weights than those
        # that were announced would silently have a wrong gradient.
        if gradients is None or not torch.allclose(scale * expected, upstream, rtol=1e-5, atol=0.0):
            _, gradients = ctx.head_pass.run(inputs, tuple(upstream.tolist()), ctx.needs_input_grad[:3])
            scale = upstream.new_ones(())
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(of.dtype)
            for gradient, of in zip(gradients, inputs, strict=True)
        ]
        return (*scaled, None, None)


@dataclass(frozen=True)
class _HeadPass:
    """All that a pass over the student's last layer computes with, but the layer and its input."""

    terms: tuple[Term, ...]
    teacher: Teacher
    labels: Tensor | None
    scale: float
    softcap: float | None
    vocab_size: int
    size: int
    dtype: torch.dtype | None

    def run(
        self, inputs: tuple[Tensor, Tensor, Tensor | None], weights: tuple[float, ...], needed: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Sums ``[terms]``, and the gradients of hidden states, weight and bias of the weighted total."""
        hidden, device = inputs[0], inputs[0].device
        exact = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(len(self.terms), dtype=exact, device=device)
        gradients = [
            torch.empty(of.shape, dtype=exact, device=device) if need and of is not None else None
            for of, need in zip(inputs, needed, strict=True)
        ]
        for gradient in gradients[1:]:
            if gradient is not None:
                # The first chunk writes the rest: zeros there would be one more pass over the largest tensor there is.
                gradient[self.vocab_size if len(hidden) else 0 :].zero_()
        with torch.autocast(device.type, enabled=False):
            student, teacher = self._cast(Projection(*inputs)), self.teacher
            teacher = self._cast(teacher) if isinstance(teacher, Projection) else teacher
            rooms = [
                torch.empty(min(self.size, len(hidden)) if used else 0, self.vocab_size, dtype=exact, device=device)
                for used in (True, isinstance(teacher, Projection))
            ]
            for start in range(0, len(hidden), self.size):
                tokens = slice(start, start + self.size)
                chunk = self._chunk(student, teacher, tokens, rooms)
                sums += self._sums(chunk, weights, any(needed))
                if any(needed):
                    _accumulate(gradients, tokens, chunk.logits.to(student.hidden.dtype), student, self.vocab_size)
        return sums, gradients

    def _cast(self, model: Projection) -> Projection:
        """The words that both models have, in the type of autocast."""
        bias = None if model.bias is None else model.bias[: self.vocab_size]
        hidden, weight = model.hidden, model.weight[: self.vocab_size]
        if self.dtype is not None:
            hidden, weight, bias = (
                hidden.to(self.dtype),
                weight.to(self.dtype),
                None if bias is None else bias.to(self.dtype),
            )
        return Projection(hidden, weight, bias, model.softcap, model.scale)

    def _chunk(self, student: Projection, teacher: Any, tokens: slice, rooms: list[Tensor]) -> Chunk:
        """Some tokens of the batch, with the student's raw logits: before scale and cap."""

        def of_teacher(part: Any) -> Any:
            if isinstance(part, Tensor):
                return full_precision(part[tokens, : self.vocab_size])
            taken = part.take(tokens)
            return taken.write_logits(rooms[1][: len(taken.hidden)]) if isinstance(taken, Projection) else taken

        taken = student.take(tokens)
        logits = taken.write_logits(rooms[0][: len(taken.hidden)])
        return Chunk(logits, _of_teacher(teacher, of_teacher), None if self.labels is None else self.labels[tokens])

    def _sums(self, chunk: Chunk, weights: tuple[float, ...], with_gradient: bool) -> Tensor:
        """Sums ``[terms]`` of a chunk; the gradient of the weighted total at its raw logits is written over them."""
        on_cpu, count = chunk.logits.device.type == "cpu", len(chunk.logits)
        compute = _block if on_cpu else _compiled_block()
        rows = max(1, _BLOCK // self.vocab_size) if on_cpu else count
        total = chunk.logits.new_zeros(len(self.terms))
        for start in range(0, count, rows):
            block = slice(start, start + rows)
            part = chunk.take(block)
            sums, gradient = compute(part, self.terms, weights, self.scale, self.softcap, with_gradient)
            total += sums
            if with_gradient:
                chunk.logits[block] = gradient
        return total


def _block(
    raw: Chunk,
    terms: tuple[Term, ...],
    weights: tuple[float, ...],
    scale: float,
    softcap: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Sums ``[terms]`` over some tokens, and the gradient ``[N, V]`` of the weighted total at their raw logits."""
    logits = raw.logits if scale == 1.0 else raw.logits * scale
    capped = None if softcap is None else torch.tanh(logits / softcap)
    logits = logits if capped is None or softcap is None else softcap * capped
    chunk = Chunk(logits, raw.teacher, raw.labels)
    sums, total = [], None
    for weight, term in zip(weights, terms, strict=True):
        values, gradient = term(chunk)
        sums.append(values.sum())
        if with_gradient:
            total = weight * gradient() if total is None else total.add_(weight * gradient())
    if total is None:
        return torch.stack(sums), logits
    if capped is not None:
        total = total * (1 - capped * capped)
    return torch.stack(sums), total if scale == 1.0 else total * scale


@functools.cache
def _compiled_block() -> Callable[..., tuple[Tensor, Tensor]]:
    # A last chunk that is shorter than the others must not compile anew for every length.
    return torch.compile(_block, dynamic=True)


def _accumulate(
    gradients: list[Tensor | None], tokens: slice, at_logits: Tensor, student: Projection, vocab_size: int
) -> None:
    """Add a chunk's share to the gradients, in float32 whatever the inputs are."""
    of_hidden, of_weight, of_bias = gradients
    hidden, kept = student.hidden[tokens], float(tokens.start > 0)
    if of_hidden is not None:
        of_hidden[tokens] = at_logits @ student.weight
    if of_weight is not None:
        if at_logits.dtype == of_weight.dtype:
            of_weight[:vocab_size].addmm_(at_logits.T, hidden, beta=kept)
        elif kept:
            of_weight[:vocab_size] += at_logits.T @ hidden
        else:
            of_weight[:vocab_size] = at_logits.T @ hidden
    if of_bias is not None:
        shares = at_logits.sum(0, dtype=of_bias.dtype)
        of_bias[:vocab_size] = of_bias[:vocab_size] + shares if kept else shares
