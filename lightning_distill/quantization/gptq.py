"""GPTQ: weights rounded one input after another, each error made good by the inputs that are still to come."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_distill.arguments import typed

BITS = (2, 3, 4, 8)
#: Columns that are corrected at once for everything before them, and within those, for everything in the same block.
BLOCK, SUB_BLOCK = 128, 32
_CHUNK = 2048
#: 256 times float16's smallest number: from there on it is off by 0.2 % at most.
_SHORTEST = 2.0**-16


class Hessian:
    r"""Running mean :math:`H = 2\,\mathbb{E}[x x^\top]` of a layer's inputs, in float32.

    Args:
        width: Number of input features.
        device: Where to keep it.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization import Hessian
        >>> hessian = Hessian(2)
        >>> hessian.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> hessian.matrix()
        tensor([[10., 14.],
                [14., 20.]])
    """

    def __init__(self, width: int, device: torch.device | str | None = None) -> None:
        self.count = 0
        self._upper = torch.zeros(width, width, device=device)
        self._waiting: list[Tensor] = []

    def update(self, inputs: Tensor) -> None:
        """Add inputs.

        Args:
            inputs: Shape ``[..., width]``; every row counts, so leave padding out.
        """
        width = len(self._upper)
        # One multiplication for about 2,048 tokens: for fewer, reading and writing H would be most of the work.
        for rows in inputs.detach().reshape(-1, width).split(_CHUNK):
            self._waiting.append(rows)
            if sum(map(len, self._waiting)) >= _CHUNK:
                self._flush()

    def _flush(self) -> None:
        if not sum(map(len, self._waiting)):
            return
        rows = torch.cat([rows.to(self._upper) for rows in self._waiting])
        self._waiting = []
        self.count += len(rows)
        new = len(rows) / self.count
        # H is symmetric: only the blocks on and above the diagonal are computed.
        step = 256 if len(self._upper) < 2048 else 512
        for start in range(0, len(self._upper), step):
            block = slice(start, start + step)
            self._upper[block, start:].addmm_(
                rows[:, block].T, rows[:, start:], beta=1 - new, alpha=2 * new / len(rows)
            )

    def matrix(self) -> Tensor:
        """The mean so far, float32 of shape ``[width, width]``."""
        self._flush()
        return self._upper.triu() + self._upper.triu(1).T


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


def narrowest(scales: Tensor) -> Tensor:
    """Scales in float16, as the checkpoint format has them, or in float32 if float16 does not hold each of them.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization.gptq import narrowest
        >>> narrowest(torch.tensor([0.5])).dtype, narrowest(torch.tensor([0.5, 1e-9])).dtype
        (torch.float16, torch.float32)
    """
    short = scales.half()
    return short if bool((short.float() == scales).all()) else scales.clone()


def find_grid(values: Tensor, bits: int, *, sym: bool = True, mse: bool = False) -> tuple[Tensor, Tensor]:
    r"""Scale and zero point of the grid :math:`s (q - z),\ 0 \le q < 2^{bits}` for each row of values.

    Args:
        values: Shape ``[..., n]``: what shares one scale along the last dimension.
        bits: Bits of a code.
        sym: Put the zero in the middle of the grid; otherwise where the smallest value wants it, but never at code
            0, which the first version of the checkpoint format cannot write.
        mse: Search 80 smaller ranges for the one with the least :math:`\sum |x - \hat x|^{2.4}`.

    Returns:
        Scales and zeros (integers), float32 of shape ``[...]``. float16 holds a scale exactly, unless it is below
        1.5e-5, where float16 would be off by more than 0.2 %, or above 65,504.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization.gptq import find_grid
        >>> find_grid(torch.tensor([-1.5, 0.0, 3.0]), bits=2, sym=False)
        (tensor(1.5000), tensor(1.))
    """
    top = 2**bits - 1
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    else:
        low = torch.minimum(low, -high / (top - 1))

    def grid(shrink: float) -> tuple[Tensor, Tensor]:
        scale = shrink * (high / top - low / top)
        short = scale.half().float()
        scale = torch.where((scale >= _SHORTEST) & short.isfinite(), short, scale)
        scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)
        zero = torch.full_like(scale, (top + 1) / 2) if sym else (-shrink * low / scale).round().clamp(1, top)
        return scale, zero

    scale, zero = grid(1.0)
    if mse:
        best = torch.full_like(scale, math.inf)
        for step in range(80):
            candidate, offset = grid(1 - step / 100)
            error = (_nearest(values, candidate.unsqueeze(-1), offset.unsqueeze(-1), top) - values).abs_().pow_(2.4)
            error = error.sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, candidate, scale), torch.where(better, offset, zero)
    return scale, zero


def _nearest(values: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    # The point of the grid that is nearest to each value.
    return (values / scale).round_().clamp_(-zero, top - zero).mul_(scale)


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
        sym: See :func:`find_grid`.
        desc_act: Take the inputs in the order of decreasing activation, :math:`H_{ii}`.
        static_groups: Fix the grid of each group, neighbouring inputs, beforehand. Otherwise a group is the next
            ``group_size`` inputs in the order of work, and its grid fits its weights as they are by then.
        mse: See :func:`find_grid`.
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
    width, top, device = weight.shape[1], 2**bits - 1, weight.device
    weight = weight.detach().float()
    if hessian is None:
        factor, damp_percent, damp = 2**0.5 * torch.eye(width, device=device), 0.0, 0.0
        order = torch.arange(width, device=device)
    else:
        hessian = hessian.to(weight)
        order = (
            hessian.diagonal().argsort(descending=True, stable=True) if desc_act else torch.arange(width, device=device)
        )
        factor, damp_percent, damp = upper_factor(hessian[order][:, order], damp_percent)
    size = width if group_size == -1 else min(group_size, width)
    fitted = not static_groups and hessian is not None and size < width

    # Work on W^T: an input's weights are one row, so that each step reads memory in a line.
    columns = weight.T[order].contiguous()
    g_idx = torch.arange(width, device=device) // size
    grids: list[tuple[Tensor, Tensor]] = []
    if fitted:
        g_idx[order] = g_idx.clone()
    else:
        grids = [find_grid(group, bits, sym=sym, mse=mse) for group in weight.split(size, dim=1)]
    groups = g_idx[order].tolist()

    chosen = torch.empty_like(columns)  # codes less their zero point
    left = torch.empty_like(columns)  # w - q of the inputs that are done
    diagonal = factor.diagonal()
    unit = factor / diagonal  # R_ji / R_ii
    block = size if fitted else BLOCK
    for start in range(0, width if hessian is not None else 0, block):
        stop = min(start + block, width)
        target = torch.addmm(columns[start:stop], unit[:start, start:stop].T, left[:start])
        if fitted:
            # What the group's weights become when each makes good what the ones before it left, before any rounding.
            inner, push = unit[start:stop, start:stop].T, columns[start:stop] - target
            moved = torch.linalg.solve_triangular(inner, push, upper=False, unitriangular=True)
            grids.append(find_grid((columns[start:stop] - moved).T, bits, sym=sym, mse=mse))
        limits = {group: _limits(grids[group][0], grids[group][1], top) for group in set(groups[start:stop])}
        for sub in range(start, stop, SUB_BLOCK):
            sub_stop = min(sub + SUB_BLOCK, stop)
            target[sub - start : sub_stop - start].addmm_(unit[start:sub, sub:sub_stop].T, left[start:sub])
            for i in range(sub, sub_stop):
                scale, low, high = limits[groups[i]]
                value = torch.addmv(target[i - start], left[sub:i].T, unit[sub:i, i])
                torch.div(value, scale, out=chosen[i]).round_().clamp_(low, high)
                torch.addcmul(columns[i], chosen[i], scale, value=-1, out=left[i])

    scales, zeros = (torch.stack(parts) for parts in zip(*grids, strict=True))
    scale, low, high = _limits(scales[groups], zeros[groups], top)
    rounded = (columns / scale).round_().clamp_(low, high)
    rounded_left = torch.addcmul(columns, rounded, scale, value=-1)
    powers, rounding_errors = _power(columns, factor, damp), _power(rounded_left, factor, damp)
    if hessian is None:
        chosen, errors = rounded, rounding_errors
    else:
        errors = _power(left, factor, damp)
        chosen = torch.where(errors > rounding_errors, rounded, chosen)
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
        powers=powers,
        damp_percent=damp_percent,
    )


def _limits(scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    return scale, -zero, top - zero


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


def upper_factor(hessian: Tensor, damp_percent: float = 0.01) -> tuple[Tensor, float, float]:
    r"""Upper triangular R with :math:`R R^\top = H + \lambda I`; its inverse is the Cholesky factor of GPTQ's paper.

    Args:
        hessian: Shape ``[n, n]``.
        damp_percent: :math:`\lambda` as a share of the mean of H's diagonal, raised tenfold while there is no factor.

    Returns:
        R, the damping that was enough as a share, and :math:`\lambda`.

    Raises:
        ValueError: If H is zero or not positive semidefinite.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization.gptq import upper_factor
        >>> factor, share, damp = upper_factor(torch.diag(torch.tensor([3.99, 0.0])), damp_percent=0.005)
        >>> factor.diagonal(), share
        (tensor([2.0000, 0.0999]), 0.005)
    """
    mean = float(hessian.diagonal().mean())
    if not mean > 0:
        raise ValueError("Expected argument `hessian` to hold at least one input, but it is zero; calibrate first.")
    # Reversing rows and columns turns the lower factor of torch into an upper one.
    reversed_hessian = hessian.flip(0, 1)
    share = damp_percent
    while True:
        damped = reversed_hessian.clone()
        damped.diagonal().add_(share * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(factor.diagonal().isfinite().all()):
            return factor.flip(0, 1), share, share * mean
        if share >= 1:
            raise ValueError(
                "Expected argument `hessian` to be a mean of outer products, but it has no Cholesky factor even with "
                "its mean diagonal added; check the calibration inputs."
            )
        share = min(1.0, max(share, 1e-4) * 10)


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
