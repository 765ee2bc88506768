"""Gradient clipping as functions on gradients: norms over all shards, coefficients, thresholds, in-place scaling.

``groups`` are gradients by kind, each group what one foreach call can take: :func:`group_tensors` makes them. A caller
with the same parameters at every step groups those once: for thousands of tensors that is a fifth of the time. DTensors
(FSDP2) count with all their shards, which makes a norm a collective call.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

_EPS = 1e-6
"""Added to every norm that divides, as `torch.nn.utils.clip_grad_norm_` does."""

Groups = Sequence[Sequence[Tensor]]


def group_tensors(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors of any shapes by device, type and mesh of shards, in the order of their first appearance.

    Example:
        >>> [len(group) for group in group_tensors([torch.ones(2), torch.ones(3).double(), torch.ones(1)])]
        [2, 1]
    """
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        groups.setdefault((tensor.device, tensor.dtype, mesh), []).append(tensor)
    return list(groups.values())


def gradient_of(parameter: Tensor) -> Tensor | None:
    """A parameter's gradient, or None; of a sparse one, which is coalesced, the entries it stores, in the same memory.

    Example:
        >>> words = torch.nn.Embedding(9, 2, sparse=True)
        >>> words(torch.tensor([3, 3, 5])).sum().backward()
        >>> gradient_of(words.weight)
        tensor([[2., 2.],
                [1., 1.]])
    """
    gradient = parameter.grad
    if gradient is None or not gradient.is_sparse:
        return gradient
    if not gradient.is_coalesced():
        parameter.grad = gradient = gradient.coalesce()
    return gradient._values()


def total_norm(groups: Groups) -> Tensor:
    """Euclidean norm of all gradients taken as one vector, over all shards of a sharded model.

    Gradients of half precision are accumulated in float32, where a squared entry does not overflow. The result is a
    scalar on the device of the first gradient; 0 if there is none.

    Example:
        >>> total_norm(group_tensors([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]))
        tensor(5.)
    """
    norms = [_joined(group) for group in groups if group]
    if not norms:
        return torch.zeros(())
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def all_finite(groups: Groups) -> Tensor:
    """Whether no gradient has a NaN or infinite entry, for less than the price of a norm: a boolean scalar.

    Example:
        >>> all_finite([[torch.ones(2), torch.tensor([1.0, float("inf")])]])
        tensor(False)
    """
    finite = []
    for group in groups:
        if not group:
            continue
        if isinstance(group[0], DTensor) or group[0].device.type not in ("cpu", "cuda"):
            finite.append(_joined(group).isfinite())
            continue
        # A sum is not finite if an entry is not, and costs a third; one that overflows is decided below.
        if group[0].is_cpu and bool(torch.stack([tensor.sum() for tensor in group]).isfinite().all()):
            continue
        # What a GradScaler unscales with: a factor of one changes nothing, and infinite entries are noted on the way.
        found, one = torch.zeros(1, device=group[0].device), torch.ones(1, device=group[0].device)
        torch._amp_foreach_non_finite_check_and_unscale_(list(group), found, one)
        finite.append(found[0] == 0)
    if not finite:
        return torch.ones((), dtype=torch.bool)
    return finite[0] if len(finite) == 1 else torch.stack([one.to(finite[0].device) for one in finite]).all()


def norm_coefficient(norm: Tensor, max_norm: Tensor | float) -> Tensor:
    r"""The factor :math:`\min(1, m / (n + 10^{-6}))` that brings a norm :math:`n` down to :math:`m`.

    Norms may have any shape; the bound infinity leaves them alone.

    Example:
        >>> norm_coefficient(torch.tensor([0.5, 4.0]), 1.0)
        tensor([1.0000, 0.2500])

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013.
    """
    return (max_norm / (norm + _EPS)).clamp(max=1.0)


def scale_(groups: Groups, coefficient: Tensor) -> None:
    """Multiply gradients in place by a scalar.

    Example:
        >>> gradient = torch.tensor([2.0, 4.0])
        >>> scale_([[gradient]], torch.tensor(0.5))
        >>> gradient
        tensor([1., 2.])
    """
    for group in groups:
        local = _local(group)
        if local:
            torch._foreach_mul_(local, coefficient.to(local[0].device))


def clip_by_value_(groups: Groups, threshold: float) -> None:
    """Clamp every entry to [-threshold, threshold] in place.

    Example:
        >>> gradient = torch.tensor([-3.0, 0.2])
        >>> clip_by_value_([[gradient]], 0.5)
        >>> gradient
        tensor([-0.5000,  0.2000])
    """
    for group in groups:
        local = _local(group)
        if local:
            torch._foreach_clamp_min_(local, -threshold)
            torch._foreach_clamp_max_(local, threshold)


def clip_adaptively_(parameters: Groups, threshold: float, eps: float = 1e-3) -> None:
    r"""Adaptive gradient clipping: no unit's gradient longer than a share of the unit's weights, in place.

    The gradient :math:`G_i` of unit :math:`i` becomes :math:`G_i \min(1, \lambda \max(\|W_i\|, \epsilon) /
    \max(\|G_i\|, 10^{-6}))`. A unit is one row of a matrix or one output channel of a convolution (all but the first
    dimension); a vector or a scalar is one unit as a whole.

    Args:
        parameters: Parameters with gradients, by kind. Shards of a sharded parameter are rows, or are joined. A sparse
            gradient's units are the rows that it has.
        threshold: The share :math:`\lambda`, 0.01 in the paper for a batch of 4096 (larger for smaller batches).
        eps: Floor of the weights' norm, so that weights which start at zero can move.

    Example:
        >>> weight = torch.nn.Parameter(torch.eye(2))
        >>> weight.grad = torch.tensor([[3.0, 4.0], [0.0, 0.001]])
        >>> clip_adaptively_([[weight]], threshold=0.01)
        >>> weight.grad
        tensor([[0.0060, 0.0080],
                [0.0000, 0.0010]])

    Source: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", 2021.
    """
    for group in parameters:
        if not group:
            continue
        gradients = [gradient for parameter in group if (gradient := gradient_of(parameter)) is not None]
        limits = [unit_norms(_weights_of(parameter)) for parameter in group]
        norms = [unit_norms(gradient) for gradient in gradients]
        # One vector for the units of all tensors: the arithmetic is then a handful of calls, not a handful a tensor.
        limit = torch.cat([norm.flatten() for norm in limits]).clamp_(min=eps).mul_(threshold)
        norm = torch.cat([norm.flatten() for norm in norms])
        factor = torch.where(norm < limit, 1.0, limit / norm.clamp(min=_EPS))
        factors = factor.split([norm.numel() for norm in norms])
        local = _local(gradients)
        shaped = [part.view_as(norm).to(like.dtype) for part, norm, like in zip(factors, norms, local, strict=True)]
        torch._foreach_mul_(local, shaped)


def _weights_of(parameter: Tensor) -> Tensor:
    gradient, weights = parameter.grad, parameter.detach()
    return weights[gradient._indices()[0]] if gradient is not None and gradient.is_sparse else weights


def unit_norms(tensor: Tensor) -> Tensor:
    """Euclidean norm of each row or output channel, [units, 1, ..., 1], or of a vector as a whole, a scalar.

    Of a DTensor, it is that of the units in this process.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]])
    """
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
    if tensor.ndim <= 1:
        norm = torch.linalg.vector_norm(tensor, dtype=wide)
    else:
        norm = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True, dtype=wide)
    if not isinstance(norm, DTensor):
        return norm
    # Rows cut by a mesh dimension stay where they are; anything else (half rows, pieces of a vector) is joined.
    joined = [placement if placement.is_shard(0) else Replicate() for placement in norm.placements]
    return norm.redistribute(placements=joined).to_local()


def percentile_threshold(history: Tensor, percentile: float) -> Tensor:
    """The percentile, from 0 to 100, of past norms of shape [window, ...], interpolated linearly as numpy does.

    NaN stands for places not yet filled. The result is of shape [...].

    Example:
        >>> percentile_threshold(torch.tensor([1.0, 3.0, 2.0, float("nan")]), 50)
        tensor(2.)

    Source: Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive Gradient Clipping for Source Separation
    Networks", 2020.
    """
    return torch.nanquantile(history, percentile / 100, dim=0)


def zscore_threshold(
    norm: Tensor,
    mean: Tensor,
    variance: Tensor,
    threshold: float,
    *,
    option: Literal["adaptive_scaling", "mean"] = "adaptive_scaling",
    factor: float = 1.0,
) -> Tensor:
    r"""Upper bound for a norm that stands out from its past, infinity for one that does not.

    With :math:`z = (n - \mu) / \sigma` above the threshold :math:`z_t`, the bound is :math:`f (\mu + \sigma z_t^2 /
    z)`, the further out, the closer to the mean; or the mean itself.

    Args:
        norm: Norms of any shape, which is that of the bounds too.
        mean: Running means of past norms, of the same shape.
        variance: Running variances, of the same shape.
        threshold: The z-score :math:`z_t` from which a norm stands out.
        option: ``"adaptive_scaling"``, or ``"mean"`` for the mean.
        factor: :math:`f`, of the adaptive bound.

    Example:
        >>> zscore_threshold(torch.tensor([2.0, 6.0]), torch.ones(2), torch.ones(2), threshold=2.5)
        tensor([   inf, 2.2500])

    Source: Kumar, Owen, Chowdhury, Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025.
    """
    deviation = variance.sqrt()
    z = (norm - mean) / (deviation + _EPS)
    bound = mean if option == "mean" else factor * (mean + deviation * threshold**2 / z)
    return torch.where(z > threshold, bound, math.inf)


def spike_threshold(past: Tensor, factor: float | None) -> Tensor:
    """Upper bound for a norm whose past is too short for statistics: a multiple of the median, which no spike moves.

    The past is of shape [window, ...], with NaN for places not yet filled, and the bound of shape [...]: 1 where there
    is no norm above 0 yet, infinity for the factor None.

    Example:
        >>> spike_threshold(torch.tensor([[1.0, 0.0], [2.0, 0.0], [1e6, 0.0]]), 3.0)
        tensor([6., 1.])
    """
    if factor is None:
        return torch.full_like(past[0], math.inf)
    median = torch.nanquantile(past, 0.5, dim=0)
    return torch.where(median > 0, factor * median, 1.0)


def running_moments(
    value: Tensor, mean: Tensor, variance: Tensor, count: Tensor, warmup_steps: int, decay: float
) -> tuple[Tensor, Tensor]:
    r"""Mean and variance with one more value: plain ones during the warm-up, exponentially decaying ones after it.

    Values, means and variances (of the population, not of a sample) are of one shape.

    Args:
        value: New values.
        mean: Means so far.
        variance: Variances so far.
        count: How many values they hold, a scalar.
        warmup_steps: How many values the plain mean and variance are taken of.
        decay: :math:`\alpha` in :math:`\mu \leftarrow \alpha \mu + (1 - \alpha) v`.

    Example:
        >>> mean = variance = torch.zeros(())
        >>> for count, value in enumerate([1.0, 2.0, 6.0]):
        ...     mean, variance = running_moments(torch.tensor(value), mean, variance, torch.tensor(count), 3, 0.9)
        >>> mean, variance
        (tensor(3.), tensor(4.6667))

    Source: Welford, "Note on a method for calculating corrected sums of squares and products", 1962, for the warm-up.
    """
    warming_up = count < warmup_steps
    # The same update serves both phases: with a weight of 1/n it is Welford's.
    weight = torch.where(warming_up, 1 / (count + 1), 1 - decay)
    new_mean = mean + weight * (value - mean)
    distance = torch.where(warming_up, value - mean, value - new_mean)
    return new_mean, (1 - weight) * variance + weight * (value - new_mean) * distance


def percentile_bound(
    norm: Tensor, finite: Tensor, state: dict[str, Tensor], percentile: float, spike_factor: float | None
) -> Tensor:
    """Upper bound for norms [units] by :func:`percentile_threshold` of a past that takes them in, if the step counts.

    ``state`` has that past, ``history`` of shape [window, units], and ``count``, how many norms there have been. No
    step waits for a device. The other arguments are those of :class:`~lightning_distill.callbacks.GradientClipping`.
    """
    history, count = state["history"], state["count"]
    spike = spike_threshold(history, spike_factor)
    _write(history, count % len(history), norm, finite)
    bound = percentile_threshold(history, percentile)
    # Of few norms, the percentile lies above all but the largest, which may be this one.
    held = (count + 1).clamp(max=len(history))
    return torch.where(percentile / 100 * (held - 1) > held - 2, bound.minimum(spike), bound)


def zscore_bound(
    norm: Tensor,
    finite: Tensor,
    state: dict[str, Tensor],
    threshold: float,
    spike_factor: float | None,
    decay: float,
    option: Literal["adaptive_scaling", "mean"],
    factor: float,
    skip_spikes: bool,
) -> Tensor:
    """Upper bound for norms [units] by :func:`zscore_threshold` of moments that take them in, if the step counts.

    ``state`` has these, ``mean`` and ``variance`` of shape [units], ``past``, the norms of the warm-up, of shape
    [window, units], and ``count``. No step waits for a device. The other arguments are those of
    :class:`~lightning_distill.callbacks.GradientClipping`.
    """
    mean, variance, count, past = (state[name] for name in ("mean", "variance", "count", "past"))
    warming_up = count < len(past)
    bound = zscore_threshold(norm, mean, variance, threshold, option=option, factor=factor)
    bound = torch.where(warming_up, spike_threshold(past, spike_factor), bound)
    _write(past, count.clamp(max=len(past) - 1), norm, finite & warming_up)
    # All norms of the warm-up weigh the same, and none more than what a spike is cut to.
    first = past.minimum(spike_threshold(past, spike_factor))
    first_mean = first.nanmean(0)
    plain = first_mean, (first - first_mean).square().nanmean(0)
    decaying = running_moments(norm.minimum(bound), mean, variance, count, 0, decay)
    update = finite & (warming_up | ~((norm > bound) & skip_spikes))
    for old, early, late in zip((mean, variance), plain, decaying, strict=True):
        old.copy_(torch.where(update, torch.where(warming_up, early, late), old))
    return bound


def _write(past: Tensor, place: Tensor, norm: Tensor, when: Tensor) -> None:
    """Put norms into a row of those of the past, without waiting for a device."""
    place = place.reshape(1)
    past.index_copy_(0, place, torch.where(when, norm, past.index_select(0, place)))


def _joined(group: Sequence[Tensor]) -> Tensor:
    wide = torch.float32 if group[0].dtype in (torch.float16, torch.bfloat16) else None
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(group), 2.0, dtype=wide)))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _local(group: Sequence[Tensor]) -> list[Tensor]:
    if not group or not isinstance(group[0], DTensor):  # a group is of one kind
        return group if isinstance(group, list) else list(group)
    return [tensor.to_local() for tensor in group]  # type: ignore[attr-defined]
