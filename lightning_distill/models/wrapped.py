"""Models inside others: what ``torch.compile`` returns, and a peft model around its base."""

from typing import Any

from torch import nn


def compiled_in_place(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile(model)`` was called with, compiled as by ``model.compile()``.

    What ``torch.compile`` returns is a module of another class with the model inside it: the names of all weights and
    layers begin differently, in checkpoints and exported files too. Compiled in place, the same code runs and every
    name stays.

    Args:
        model: Any module.

    Returns:
        The module inside, with the same options of compilation; another model as it is.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.models.wrapped import compiled_in_place
        >>> model = nn.Linear(2, 2)
        >>> compiled_in_place(torch.compile(model, backend="eager")) is model
        True
    """
    compiled: Any = model
    own = model._modules.get("_orig_mod")
    if own is None:
        return model
    own._compiled_call_impl = compiled.dynamo_ctx(own._call_impl)
    return own


def compile_parts_in_place(model: nn.Module) -> nn.Module:
    """Do the same for the modules inside a model that were compiled one by one, such as its layers.

    Args:
        model: The model, in place.

    Returns:
        The same model, whose weights have the names they had.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.models.wrapped import compile_parts_in_place
        >>> model = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
        >>> sorted(compile_parts_in_place(model).state_dict())
        ['0.bias', '0.weight']
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = compiled_in_place(child)
    return model


def inside(model: nn.Module) -> nn.Module:
    """The model whose class and forward count: the one that was compiled, the base of a peft model, or the model.

    Args:
        model: Any module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.models.wrapped import inside
        >>> inside(torch.compile(nn.Linear(2, 2), backend="eager"))
        Linear(in_features=2, out_features=2, bias=True)
    """
    while True:
        wrapper: Any = model
        if (own := model._modules.get("_orig_mod")) is not None:
            model = own
        elif callable(getattr(type(model), "get_base_model", None)):
            model = wrapper.get_base_model()
        else:
            return model
