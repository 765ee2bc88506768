"""A value that is learned against what everything else learns."""

from typing import Any

import torch
from torch import Tensor


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    r"""The tensor itself, whose gradient is multiplied by :math:`-\lambda`: what a descent then does is to ascend.

    Args:
        x: Any tensor.
        strength: :math:`\lambda`, at least 0.

    Returns:
        A tensor of the same values.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> functional.reverse_gradient(x, 0.5).square().backward()
        >>> x.grad.item()
        -3.0

    Source: Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", 2015.
    """
    reversed_: Tensor = _Reversed.apply(x, strength)
    return reversed_


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.strength * gradient, None
