"""Algorithm 1 of the GPTQ paper as it is written, in float64: the oracle for the fast solver."""

import torch
from torch import Tensor

from lightning_distill.quantization.grid import find_grid


def paper_gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    *,
    sym: bool = True,
    desc_act: bool = True,
    static_groups: bool = True,
    mse: bool = False,
    damp_percent: float = 0.01,
) -> Tensor:
    """The dequantised weight, float64 of shape [out, in]."""
    width = weight.shape[1]
    size = width if group_size == -1 else group_size
    w, h = weight.double().clone(), hessian.double().clone()
    grids = [find_grid(group, bits, sym=sym, mse=mse) for group in weight.split(size, dim=1)]
    order = h.diagonal().argsort(descending=True, stable=True) if desc_act else torch.arange(width)
    w, h = w[:, order], h[order][:, order]
    h += damp_percent * h.diagonal().mean() * torch.eye(width, dtype=h.dtype)
    inverse_factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    quantized = torch.zeros_like(w)
    for i in range(width):
        if static_groups:
            scale, zero = grids[int(order[i]) // size]
        elif i % size == 0:
            scale, zero = find_grid(w[:, i : i + size].float(), bits, sym=sym, mse=mse)
        code = (w[:, i] / scale + zero).round().clamp(0, 2**bits - 1)
        quantized[:, i] = scale.double() * (code - zero)
        error = (w[:, i] - quantized[:, i]) / inverse_factor[i, i]
        w[:, i:] -= error[:, None] * inverse_factor[i, i:]
    result = torch.empty_like(quantized)
    result[:, order] = quantized
    return result
