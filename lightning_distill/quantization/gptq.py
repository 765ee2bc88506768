"""GPTQ: weights rounded one input after another, each error made good by the inputs that are still to come."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_distill.arguments import typed
from lightning_distill.quantization.grid import find_grid, narrowest
from lightning_distill.quantization.hessian import upper_factor

BITS = (2, 3, 4, 8)
#: Columns that are corrected at once for everything before them, and within those, for everything in the same block.
BLOCK, SUB_BLOCK = 128, 32


@dataclass
class QuantizedWeight:
    """A weight as integers: ``weight[o, i] = scales[g_idx[i], o] * (codes[o, i] - zeros[g_idx[i], o])``.

    Attributes:
        codes: uint8 of shape ``[out, in]``, each below ``2**bits``.
        scales: Shape ``[groups, out]``; float16, or float32 where :func:`narrowest` keeps it.
        zeros: uint8 of shape ``[groups, out]``.
        g_idx: int32 of shape ``[in]``: the group of each input.
        bits: Bits of a code.
        group_size: Inputs that share a scale.
        errors: Per output, the mean square of what its answer on the calibration inputs lost; ``[out]``, float32.
        rounding_errors: The same for rounding to nearest on the same grid.
        powers: Mean square of each output itself, for errors in relative terms.
        damp_percent: The damping that was needed, as a share of the mean of the Hessian's diagonal.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int
    group_size: int
    errors: Tensor
    rounding_errors: Tensor
    powers: Tensor
    damp_percent: float

    def dequantize(self) -> Tensor:
        """The weight that the integers stand for, float32 of shape ``[out, in]``."""
        group = self.g_idx.long()
        return self.scales.float().T[:, group] * (self.codes.float() - self.zeros.float().T[:, group])

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """The outputs from ``start`` to ``stop`` alone."""
        per_out = {name: getattr(self, name)[start:stop] for name in ("codes", "errors", "rounding_errors", "powers")}
        scales, zeros = self.scales[:, start:stop], self.zeros[:, start:stop]
        return replace(self, **per_out, scales=narrowest(scales.float()), zeros=zeros)

    @property
    def error(self) -> float:
        """Relative squared error of the layer's output, ``|(W - Q) x|^2 / |W x|^2`` over the calibration inputs."""
        return float(self.errors.sum() / self.powers.sum().clamp(min=torch.finfo(torch.float32).tiny))

    @property
    def rounding_error(self) -> float:
        """The same as :attr:`error` for rounding to nearest."""
        return float(self.rounding_errors.sum() / self.powers.sum().clamp(min=torch.finfo(torch.float32).tiny))


@typed
def gptq_layer(
    weight: Tensor,
    hessian: Tensor | None,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    desc_act: bool = True,
    static_groups: bool = True,
    mse: bool = False,
    damp_percent: float = 0.01,
) -> QuantizedWeight:
    r"""Quantise one linear layer so that its outputs on the calibration inputs change least.

    Minimises :math:`\operatorname{tr}\,(W-Q)\,H\,(W-Q)^\top` greedily, one input feature after another. The answer is
    that of the paper's Algorithm 1, reached without the inverse of H: with the upper factor :math:`H = R R^\top`, the
    value to round for input :math:`i` is

    .. math:: w_i + \sum_{j<i} (w_j - q_j)\, R_{ji} / R_{ii}

    (Babai's nearest plane), so one Cholesky factor takes the place of a factor, an inverse and another factor.

    Layers with the same inputs can be quantised as one: concatenate their weights along the outputs, then take
    :meth:`QuantizedWeight.rows`.

    Args:
        weight: Shape ``[out, in]``.
        hessian: :math:`2\,\mathbb{E}[x x^\top]`, shape ``[in, in]``; None rounds to nearest (and measures errors as
            for white inputs).
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; -1 for all. The last group may be smaller.
        sym: See :func:`lightning_distill.quantization.grid.find_grid`.
        desc_act: Take the inputs in the order of decreasing activation, :math:`H_{ii}`.
        static_groups: Fix the grid of each group, neighbouring inputs, beforehand. Otherwise a group is the next
            ``group_size`` inputs in the order of work, and its grid fits its weights as they are by then.
        mse: See :func:`lightning_distill.quantization.grid.find_grid`.
        damp_percent: Share of the mean of H's diagonal that is added to the diagonal; raised tenfold, at most to 1,
            while H has no Cholesky factor.

    Returns:
        The integers, their grid and what they cost. Never worse than rounding on the same inputs: should the greedy
        answer lose in an output (it almost never does), that output is rounded.

    Raises:
        ValueError: If an option is outside its set, the shapes do not fit, weights or Hessian are not finite, or H is
            zero.

    Source: Frantar et al., "GPTQ", 2022; Chen et al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest
    Plane Algorithm", 2025.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization import Hessian, gptq_layer
        >>> _ = torch.manual_seed(0)
        >>> inputs, hessian = torch.randn(512, 64) @ torch.randn(64, 64), Hessian(64)
        >>> hessian.update(inputs)
        >>> quantized = gptq_layer(torch.randn(16, 64), hessian.matrix(), bits=3, group_size=32)
        >>> quantized.codes.shape, quantized.scales.shape
        (torch.Size([16, 64]), torch.Size([2, 16]))
        >>> quantized.error < 0.7 * quantized.rounding_error
        True
    """
    _check_options(bits, group_size, damp_percent)
    _check_tensors(weight, hessian)
    width, device, weight = weight.shape[1], weight.device, weight.detach().float()
    size = width if group_size == -1 else min(group_size, width)
    order, factor, damp_percent, damp = _factored(width, device, hessian, desc_act, damp_percent)
    # Work on W^T: an input's weights are one row, so that each step reads memory in a line.
    columns, g_idx = weight.T[order].contiguous(), torch.arange(width, device=device) // size
    find = functools.partial(find_grid, bits=bits, sym=sym, mse=mse)
    if static_groups or hessian is None or size == width:
        grids = [find(group) for group in weight.split(size, dim=1)]
        greedy = (
            None if hessian is None else _round_greedily(columns, factor, g_idx[order].tolist(), grids, bits, BLOCK)
        )
    else:
        g_idx[order], grids = g_idx.clone(), []
        greedy = _round_greedily(columns, factor, g_idx[order].tolist(), grids, bits, size, find)
    scales, zeros = (torch.stack(parts) for parts in zip(*grids, strict=True))
    groups = g_idx[order]
    scale, low, high = _limits(scales[groups], zeros[groups], bits)
    chosen = (columns / scale).round_().clamp_(low, high)
    errors = rounding_errors = _lost(columns, chosen, scale, factor, damp)
    if greedy is not None:
        errors = _lost(columns, greedy, scale, factor, damp)
        chosen = torch.where(errors > rounding_errors, chosen, greedy)
        errors = torch.minimum(errors, rounding_errors)
    codes = torch.empty_like(chosen, dtype=torch.uint8)
    codes[order] = chosen.sub_(low).to(torch.uint8)
    return QuantizedWeight(
        codes=codes.T.contiguous(),
        scales=narrowest(scales),
        zeros=zeros.to(torch.uint8),
        g_idx=g_idx.to(torch.int32),
        bits=bits,
        group_size=size,
        errors=errors,
        rounding_errors=rounding_errors,
        powers=_power(columns, factor, damp),
        damp_percent=damp_percent,
    )


def _factored(
    width: int, device: torch.device, hessian: Tensor | None, desc_act: bool, damp_percent: float
) -> tuple[Tensor, Tensor, float, float]:
    """The order of the inputs, the factor in this order, and the damping, as a share and as it is."""
    order = torch.arange(width, device=device)
    if hessian is None:
        return order, 2**0.5 * torch.eye(width, device=device), 0.0, 0.0
    hessian = hessian.to(device, torch.float32)
    if desc_act:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    return order, *upper_factor(hessian[order][:, order], damp_percent)


def _round_greedily(
    columns: Tensor,
    factor: Tensor,
    groups: list[int],
    grids: list[tuple[Tensor, Tensor]],
    bits: int,
    block: int,
    find: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Codes less their zero points ``[in, out]``; with ``find``, a grid for each block, found when it is reached."""
    chosen, left = torch.empty_like(columns), torch.empty_like(columns)  # left: w - q of the inputs that are done
    unit = factor / factor.diagonal()  # R_ji / R_ii
    for start in range(0, len(columns), block):
        stop = min(start + block, len(columns))
        target = torch.addmm(columns[start:stop], unit[:start, start:stop].T, left[:start])
        if find is not None:
            # What the group's weights become when each makes good what the ones before it left, before any rounding.
            inner, push = unit[start:stop, start:stop].T, columns[start:stop] - target
            moved = torch.linalg.solve_triangular(inner, push, upper=False, unitriangular=True)
            grids.append(find((columns[start:stop] - moved).T))
        limits = {group: _limits(*grids[group], bits) for group in set(groups[start:stop])}
        for sub in range(start, stop, SUB_BLOCK):
            sub_stop = min(sub + SUB_BLOCK, stop)
            target[sub - start : sub_stop - start].addmm_(unit[start:sub, sub:sub_stop].T, left[start:sub])
            for i in range(sub, sub_stop):
                scale, low, high = limits[groups[i]]
                value = torch.addmv(target[i - start], left[sub:i].T, unit[sub:i, i])
                torch.div(value, scale, out=chosen[i]).round_().clamp_(low, high)
                torch.addcmul(columns[i], chosen[i], scale, value=-1, out=left[i])
    return chosen


def _limits(scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, lowest and highest code less the zero point."""
    return scale, -zero, 2**bits - 1 - zero


def _lost(columns: Tensor, chosen: Tensor, scale: Tensor, factor: Tensor, damp: float) -> Tensor:
    """Per output, the mean square of what its answer loses."""
    return _power(torch.addcmul(columns, chosen, scale, value=-1), factor, damp)


def _power(columns: Tensor, factor: Tensor, damp: float) -> Tensor:
    # Mean square of x^T W^T per output, for the factor of twice the mean with `damp` on its diagonal.
    total = -damp * columns.square().sum(0)
    for start in range(0, len(columns), BLOCK):
        stop = start + BLOCK
        total += (factor[:stop, start:stop].T @ columns[:stop]).square_().sum(0)
    return total.clamp_(min=0).div_(2)


def retarget(weight: Tensor, hessian: Tensor, drift: Tensor, damp_percent: float = 0.01) -> Tensor:
    r"""The weight to quantise when inputs have drifted from those the layer was trained on.

    Layers before this one are quantised already, so it sees :math:`x` where it used to see :math:`\tilde x`. What it
    should give is still :math:`W \tilde x`, and over the calibration inputs

    .. math:: |W \tilde X - Q X|^2 = |(W' - Q) X|^2 + \text{const}, \quad
        W' = W + W\, 2\,\mathbb{E}[(\tilde x - x) x^\top]\, H^{-1}

    so that quantising :math:`W'` on :math:`H` answers it.

    Args:
        weight: Shape ``[out, in]``.
        hessian: :math:`H = 2\,\mathbb{E}[x x^\top]`, shape ``[in, in]``.
        drift: :math:`2\,\mathbb{E}[(\tilde x - x) x^\top]`, shape ``[in, in]``.
        damp_percent: As in :func:`gptq_layer`.

    Returns:
        :math:`W'`, float32 of shape ``[out, in]``.

    Source: the objective of Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
    2025.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization.gptq import retarget
        >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # each twice of what it should be
        >>> hessian = 2 * inputs.T @ inputs / 2
        >>> retarget(torch.ones(1, 2), hessian, -hessian / 2, damp_percent=0.0)
        tensor([[0.5000, 0.5000]])
    """
    weight, hessian = weight.detach().float(), hessian.float()
    factor, _, _ = upper_factor(hessian, damp_percent)
    # H = R R^T, so x H^-1 is two triangular solves.
    moved = torch.linalg.solve_triangular(factor.T, weight @ drift.float(), upper=False, left=False)
    return weight + torch.linalg.solve_triangular(factor, moved, upper=True, left=False)


def _check_options(bits: int, group_size: int, damp_percent: float) -> None:
    if bits not in BITS:
        raise ValueError(f"Expected argument `bits` to be one of {BITS}, but got {bits}.")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"Expected argument `group_size` to be -1 (all inputs) or positive, but got {group_size}.")
    if not 0 <= damp_percent <= 1:
        raise ValueError(f"Expected argument `damp_percent` to be between 0 and 1, but got {damp_percent}.")


def _check_tensors(weight: Tensor, hessian: Tensor | None) -> None:
    if weight.ndim != 2:
        raise ValueError(f"Expected argument `weight` to have shape [out, in], but got {list(weight.shape)}.")
    if not bool(weight.isfinite().all()):
        raise ValueError("Expected argument `weight` to be finite, but it holds NaN or infinite values.")
    if hessian is None:
        return
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"Expected argument `hessian` to have shape {[weight.shape[1]] * 2}, but got {list(hessian.shape)}."
        )
    if not bool(hessian.isfinite().all()):
        raise ValueError("Expected argument `hessian` to be finite, but it holds NaN or infinite values.")
