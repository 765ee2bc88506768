"""build_optimizer: optimizers of several libraries by name, with the right parameter groups."""

import importlib
import inspect
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_distill.arguments import between, one_of, typed
from lightning_distill.optim.groups import parameter_groups

_CLASSES = {
    "sgd": "torch.optim.SGD",
    "adam": "torch.optim.Adam",
    "adamw": "torch.optim.AdamW",
    "rmsprop": "torch.optim.RMSprop",
    "adagrad": "torch.optim.Adagrad",
    # torch's own multiplies the learning rate by the size of the weights, and holds it below 1 / sqrt(step).
    "adafactor": "transformers.Adafactor",
    "lion": "pytorch_optimizer.Lion",
    # torch's own takes matrices alone: the rest of a model would need a second optimizer, in manual optimization.
    "muon": "pytorch_optimizer.Muon",
    "schedule_free_adamw": "schedulefree.AdamWScheduleFree",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
}
_EXTRAS = {"pytorch_optimizer": "optim", "schedulefree": "optim", "bitsandbytes": "bitsandbytes"}
Name = Literal[
    "sgd", "adam", "adamw", "rmsprop", "adagrad", "adafactor", "lion", "muon", "schedule_free_adamw", "adamw_8bit",
    "paged_adamw_8bit",
]  # fmt: skip


@typed
def build_optimizer(
    module: nn.Module,
    name: Name | type[Optimizer] = "adamw",
    lr: float = 5e-5,
    weight_decay: float = 0.0,
    *,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    amsgrad: bool | None = None,
    momentum: float | None = None,
    dampening: float | None = None,
    nesterov: bool | None = None,
    alpha: float | None = None,
    warmup_steps: int | None = None,
    adamw_lr: float | None = None,
    fused: bool | None = None,
    lr_by_name: dict[str, float] | None = None,
    layer_decay: float | None = None,
) -> Optimizer:
    """Make an optimizer over a module's trainable parameters (of a peft model: the adapters).

    Every option left at None has the default of the library that wrote the optimizer; one that the optimizer does not
    have is refused. From a command line: ``parser.add_function_arguments(build_optimizer, "optimizer",
    skip={"module"})`` gives ``--optimizer.name lion --optimizer.lr 1e-4`` and the same from YAML.

    ``muon`` takes the matrices between embedding and head; AdamW, inside the same optimizer, takes everything else.
    ``schedule_free_adamw`` needs the callback :class:`~lightning_distill.callbacks.ScheduleFree` and no schedule.

    Args:
        module: The module.
        name: The optimizer: torch's, Adafactor of transformers (with an external learning rate), Lion and Muon of
            pytorch-optimizer, AdamW of schedulefree, 8-bit AdamW of bitsandbytes (CUDA only); or any class, as such or
            by its path (``"torch.optim.Adamax"``).
        lr: Learning rate.
        weight_decay: Weight decay of matrices: see :func:`parameter_groups`.
        betas: Of Adam and its kin.
        eps: Added to denominators.
        amsgrad: Whether Adam keeps the maximum of its second moments.
        momentum: Of SGD, RMSprop and Muon.
        dampening: Of SGD's momentum.
        nesterov: Of SGD and Muon.
        alpha: Smoothing of RMSprop.
        warmup_steps: Of schedule-free AdamW, in optimizer steps.
        adamw_lr: Of Muon: the learning rate of the parameters AdamW takes.
        fused: Whether torch's optimizer is one kernel.
        lr_by_name: Learning rates by pattern on names: see :func:`parameter_groups`.
        layer_decay: Factor per layer: see :func:`parameter_groups`.

    Returns:
        The optimizer.

    Raises:
        ValueError: If the name is unknown, an option is not the optimizer's, or 8 bits are asked for without CUDA.
        ImportError: If the optimizer's library is missing; it names what to install.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.optim import build_optimizer
        >>> optimizer = build_optimizer(nn.Linear(4, 2), "adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
        >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
        [('all', 0.1), ('all/no_decay', 0.0)]
    """
    given = {"betas": betas, "eps": eps, "amsgrad": amsgrad, "momentum": momentum, "dampening": dampening}
    given |= {"nesterov": nesterov, "alpha": alpha, "warmup_steps": warmup_steps, "adamw_lr": adamw_lr, "fused": fused}
    options: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    make: Any = _load(name)
    has = () if name == "adafactor" else inspect.signature(make).parameters  # whose `eps` are two
    for option in options:
        if option not in has:
            allowed = ", ".join(f"`{known}`" for known in given if known in has) or "none"
            raise ValueError(f"Expected argument `{option}` to be left out for {name!r}, which has {allowed}.")
    for option in options.keys() & {"eps", "momentum", "dampening", "alpha", "warmup_steps"}:
        between(option, options[option], 0, closed=True)
    for beta in betas or ():
        between("betas", beta, 0, 1, closed=True)
    groups = parameter_groups(module, lr, weight_decay, lr_by_name=lr_by_name, layer_decay=layer_decay)
    if name == "muon":
        groups = _split_for_muon(module, groups, options.pop("adamw_lr", None))
    if name == "adafactor":  # with its own step size it would ignore the learning rate and every schedule
        options = {"scale_parameter": False, "relative_step": False}
    optimizer: Optimizer = make(groups, lr=lr, **options)
    if name == "schedule_free_adamw":
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _load(name: str | type[Optimizer]) -> type[Optimizer]:
    """The class of a name, or at a path."""
    if isinstance(name, type):
        return name
    if name not in _CLASSES and "." not in name:
        one_of("name", name, _CLASSES)
    library, _, kind = _CLASSES.get(name, name).rpartition(".")
    package = library.partition(".")[0]
    if package == "bitsandbytes" and not torch.cuda.is_available():
        raise ValueError(f"Expected argument `name` to be an optimizer for this machine, but {name!r} needs CUDA.")
    try:
        found = getattr(importlib.import_module(library), kind, None)
    except ModuleNotFoundError as error:
        if package in _EXTRAS:
            extra = _EXTRAS[package]
            raise ImportError(f'{kind} comes from {package}: pip install "lightning-distill[{extra}]"') from error
        found = None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"Expected argument `name` to be an optimizer class that can be imported, but got {name!r}.")
    return found


def _split_for_muon(module: nn.Module, groups: list[dict[str, Any]], adamw_lr: float | None) -> list[dict[str, Any]]:
    """Muon for the hidden matrices, AdamW for embeddings, the last linear layer, and all that is not a matrix."""
    not_hidden = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    linear = [m for m in module.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    not_hidden |= {id(linear[-1].weight)} if linear else set()
    split = []
    for group in groups:
        hidden = [p for p in group["params"] if p.ndim == 2 and id(p) not in not_hidden]
        rest = [p for p in group["params"] if p.ndim != 2 or id(p) in not_hidden]
        if hidden:
            split.append({**group, "params": hidden, "use_muon": True})
        if rest:
            adamw = {} if adamw_lr is None else {"lr": adamw_lr}
            split.append({**group, **adamw, "params": rest, "use_muon": False, "name": f"{group['name']}/adamw"})
    return split
