"""Grids: which numbers the integers of a group of weights stand for."""

import math

import torch
from torch import Tensor

#: 256 times float16's smallest number: from there on it is off by 0.2 % at most.
_SHORTEST = 2.0**-16


def narrowest(scales: Tensor) -> Tensor:
    """Scales in float16, as the checkpoint format has them, or in float32 if float16 does not hold each of them.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization.grid import narrowest
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
        >>> from lightning_distill.quantization.grid import find_grid
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
