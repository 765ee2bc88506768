"""Which layers a layer that holds integers can stand in for."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def why_not_replaceable(layer: nn.Module) -> str | None:
    """Why a layer could do something else than its weight says, or None if it is as plain as its class.

    Args:
        layer: A linear layer or an embedding, or of a class that is derived from one.

    Returns:
        A reason for the report.

    Example:
        >>> from torch import nn
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> from lightning_distill.quantization.replaceable import why_not_replaceable
        >>> why_not_replaceable(nn.Linear(4, 4)), why_not_replaceable(weight_norm(nn.Linear(4, 4)))
        (None, 'its weight or bias is parametrised')
    """
    if is_parametrized(layer):
        return "its weight or bias is parametrised"
    if type(layer) not in (nn.Linear, Conv1D, nn.Embedding):
        return f"a {type(layer).__name__} may compute something else than its base class"
    weight = layer.weight
    if type(weight) is not nn.Parameter or not weight.dtype.is_floating_point:
        return "its weight is no plain parameter of floating point numbers"
    if not set(layer._parameters) <= {"weight", "bias"} or layer._buffers or layer._modules:
        return "it holds more than a weight and a bias"
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        return "it has hooks"
    if "forward" in vars(layer):
        return "its forward was replaced"
    if getattr(layer, "max_norm", None) is not None:
        return "it changes its rows as it reads them (max_norm)"
    return None


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode, also where a tensor is kept that was computed with a gradient.

    The weights of ``torch.nn.utils.weight_norm`` and of ``torch.nn.utils.prune`` are such, which torch does not copy.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.quantization.replaceable import copied
        >>> copied(nn.Dropout()).training
        False
    """
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    with torch.no_grad():
        memo = {id(value): value.detach().clone() for value in computed}
    return copy.deepcopy(model, memo).eval()
