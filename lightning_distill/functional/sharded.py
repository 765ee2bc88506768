"""Divergences of predictions whose classes are spread over processes, as tensor parallelism leaves them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distill.functional.divergences import (
    LOG_ZERO,
    Divergence,
    check_divergence,
    check_temperature,
    divergence_of,
)
from lightning_distill.functional.reduction import Reduction, check_same_shape, reduce, select


def sharded_soft_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    group: Any = None,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float | None = None,
    alpha: float | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """:func:`soft_target` where each process holds some of the classes, without gathering them.

    Every process of the group calls it with its own shard of the same items, gets the whole loss, and backward gives
    each the gradient of its shard. Three numbers an item travel. A vocabulary may be cut into unequal shards, but the
    same for both models.

    Args:
        student_logits: Shape ``[..., C_i]``, the classes of this process.
        teacher_logits: Likewise.
        group: The process group over which the classes are spread; None for all processes, or where there are none.
        temperature: As in :func:`soft_target`, also ``divergence``, ``beta`` and ``alpha``.
        divergence: Its name; not ``"adaptive_kl"``, which orders all classes.
        beta: As in :func:`soft_target`.
        alpha: Likewise.
        mask: Bool ``[...]``, the items that count, the same in all processes; None where all do.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``, the same in all processes.

    Raises:
        ValueError: If shapes differ or an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> round(functional.sharded_soft_target(student, teacher, temperature=2.0).item(), 4)
        0.4438

    Source: the pair of operators whose forward or backward is a sum over processes is that of Shoeybi et al.,
    "Megatron-LM", 2019.
    """
    check_divergence(divergence, beta, alpha)
    if divergence == "adaptive_kl":
        raise ValueError(
            "Expected argument `divergence` to be a sum over classes, but got 'adaptive_kl', which orders all of them. "
            "Take 'jeffreys', or gather the logits and call `functional.soft_target`."
        )
    check_same_shape(student_logits, teacher_logits, "student_logits", "teacher_logits")
    check_temperature(temperature)
    student, teacher = (
        _log_probabilities(logits / temperature, group) for logits in select(mask, student_logits, teacher_logits)
    )
    # Each divergence is a sum over classes.
    values = temperature**2 * _summed(divergence_of(student, teacher, divergence, beta, alpha)[0], group)
    return reduce(values, student_logits.shape[:-1], mask, reduction, num_items)


def _log_probabilities(logits: Tensor, group: Any) -> Tensor:
    highest = logits.detach().amax(-1, keepdim=True)
    if _is_spread(group):
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    shifted = logits - highest
    log_total = _summed(shifted.exp().sum(-1, keepdim=True), group).log()
    # The classes of all processes depend on the total, so its gradient is the sum of theirs.
    return (shifted - _shared(log_total, group)).clamp(min=LOG_ZERO)


def _is_spread(group: Any) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _summed(values: Tensor, group: Any) -> Tensor:
    return _Summed.apply(values, group) if _is_spread(group) else values


def _shared(values: Tensor, group: Any) -> Tensor:
    return _Shared.apply(values, group) if _is_spread(group) else values


class _Summed(torch.autograd.Function):
    """The sum over processes, each of which goes on with it alike: the gradient of each part is that of the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _Shared(torch.autograd.Function):
    """The value itself, used by each process for other classes: the gradient is the sum over processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
