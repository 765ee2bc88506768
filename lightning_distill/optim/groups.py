"""Parameter groups: learning rates by name and by depth, weight decay only where it belongs."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_distill.arguments import between, typed


@typed
def parameter_groups(
    module: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    lr_by_name: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    r"""Groups of a module's trainable parameters for any optimizer.

    Biases, norms and all other parameters with at most one dimension get no weight decay. With ``layer_decay``
    :math:`d` the learning rates follow the convention of BEiT: of :math:`L` layers, layer :math:`i` (from 1) gets
    :math:`\eta d^{L + 1 - i}`, what is registered before the layers (embeddings) :math:`\eta d^{L + 1}`, what comes
    after them (pooler, head) :math:`\eta`. Frozen layers count in :math:`L`.

    Args:
        module: The module; frozen parameters are left out, tied ones appear once.
        lr: Learning rate :math:`\eta`.
        weight_decay: Weight decay of matrices and larger tensors.
        lr_by_name: Learning rates by pattern on parameter names (``{"*.classifier.*": 1e-3}``); the first pattern that
            matches decides, whatever the layer.
        layer_decay: Factor per layer; None for one learning rate.

    Returns:
        Dictionaries with ``params``, ``lr``, ``weight_decay`` and ``name``.

    Raises:
        ValueError: If nothing is trainable, a pattern matches nothing, or ``layer_decay`` finds no layers.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.optim import parameter_groups
        >>> model = nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 2)})
        >>> for group in parameter_groups(model, lr=1e-5, weight_decay=0.1, lr_by_name={"head.*": 1e-3}):
        ...     print(group["name"], group["lr"], group["weight_decay"], len(group["params"]))
        all 1e-05 0.1 1
        all/no_decay 1e-05 0.0 1
        head.* 0.001 0.1 1
        head.*/no_decay 0.001 0.0 1

    Source: Bao, Dong, Piao, Wei, "BEiT: BERT Pre-Training of Image Transformers", 2021, for the layer-wise decay.
    """
    between("lr", lr, 0)
    between("weight_decay", weight_decay, 0, closed=True)
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not named:
        raise ValueError("Expected argument `module` to have trainable parameters, but got none. Unfreeze some.")
    patterns = dict(lr_by_name or {})
    for pattern, rate in patterns.items():
        between(f"lr_by_name[{pattern!r}]", rate, 0)
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(
                f"Expected argument `lr_by_name` to match names of trainable parameters, but got {pattern!r}, which "
                f"matches none; they look like {next(iter(named))!r}."
            )
    depth_of = {} if layer_decay is None else _layers_below_the_head(module, layer_decay)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named.items():
        matching = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
        if matching is not None:
            label, rate = matching, patterns[matching]
        elif layer_decay is not None:
            label, rate = f"depth{depth_of[name]}", lr * layer_decay ** depth_of[name]
        else:
            label, rate = "all", lr
        decayed = parameter.ndim > 1 and not name.endswith("bias")
        label = label if decayed else f"{label}/no_decay"
        new = {"params": [], "lr": rate, "weight_decay": weight_decay if decayed else 0.0, "name": label}
        groups.setdefault(label, new)["params"].append(parameter)
    return list(groups.values())


def _layers_below_the_head(module: nn.Module, layer_decay: float) -> dict[str, int]:
    """By parameter name, how many factors its learning rate gets: 0 for the head, L + 1 for the embeddings."""
    between("layer_decay", layer_decay, 0, 1)
    lists = [(path, part) for path, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    stacks = {path: len(part) for path, part in lists if any(weight.requires_grad for weight in part.parameters())}
    if not stacks:
        raise ValueError("Expected argument `layer_decay` to be None for a module without a ModuleList of layers.")
    stack = max(stacks, key=lambda path: stacks[path])
    factors, outside = {}, stacks[stack] + 1
    for name, _ in module.named_parameters():
        if name.startswith(f"{stack}."):
            factors[name], outside = stacks[stack] - int(name.removeprefix(f"{stack}.").partition(".")[0]), 0
        else:
            factors[name] = outside
    return factors
