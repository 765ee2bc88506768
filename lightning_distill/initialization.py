"""Initialise weights by a named rule, or by the activation that follows each layer."""

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, fx, nn

Policy = Literal[
    "auto",
    "xavier_uniform",
    "xavier_normal",
    "kaiming_uniform",
    "kaiming_normal",
    "lecun_normal",
    "lecun_uniform",
    "orthogonal",
    "transformer",
]
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_ACTIVATIONS = {"relu", "leaky_relu", "selu", "tanh", "sigmoid", "gelu", "silu"}


@dataclass
class Initialized:
    """One line of the audit: what was found, what was done, and what came out."""

    parameter: str
    activation: str
    rule: str
    fan_in: int
    fan_out: int
    target_std: float
    measured_std: float

    def as_dict(self) -> dict[str, Any]:
        """The line as primitives."""
        return asdict(self)


def following_activations(model: nn.Module) -> dict[str, tuple[str, float]]:
    """The activation that follows each layer with weights, and its negative slope, by the layer's name.

    The model is traced with ``torch.fx`` and each layer's output is followed through whatever lies between; a model
    that cannot be traced is read in the order its modules were registered. A layer that meets another layer first, or
    the end, has the activation ``"linear"``.

    Args:
        model: any module.

    Example:
        >>> following_activations(nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(0.2), nn.Linear(3, 1)))
        {'0': ('leaky_relu', 0.2), '2': ('linear', 0.0)}
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # whatever a model's own code raises on a symbolic value
        return _in_registration_order(model)
    modules, found = dict(model.named_modules()), {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], _LAYERS):
            found[node.target] = _downstream(node, modules)
    missed = {name: value for name, value in _in_registration_order(model).items() if name not in found}
    return found | missed


def _downstream(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, float]:
    queue, seen = list(node.users), set()
    while queue:
        user = queue.pop(0)
        if user in seen:
            continue
        seen.add(user)
        if user.op == "call_module":
            module = modules[str(user.target)]
            if isinstance(module, _LAYERS):
                continue
            name, slope = _name_of(module), float(getattr(module, "negative_slope", 0.0))
        else:
            name = getattr(user.target, "__name__", str(user.target)).rstrip("_")
            slope = float(str(user.kwargs.get("negative_slope", 0.01))) if name == "leaky_relu" else 0.0
        if name in _ACTIVATIONS:
            return name, slope
        queue += user.users
    return "linear", 0.0


def _in_registration_order(model: nn.Module) -> dict[str, tuple[str, float]]:
    found, waiting = {}, None
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS):
            found[name] = ("linear", 0.0)
            waiting = name
        elif _name_of(module) in _ACTIVATIONS and waiting is not None:
            found[waiting] = _name_of(module), float(getattr(module, "negative_slope", 0.0))
            waiting = None
    return found


def _name_of(module: nn.Module) -> str:
    return {"LeakyReLU": "leaky_relu"}.get(type(module).__name__, type(module).__name__.lower())


def init_weight_(weight: Tensor, policy: str, activation: str, slope: float, std: float, generator: Generator) -> str:
    """Fill one weight in place by a rule, and say which rule it was.

    ``"auto"`` takes Xavier with the gain of tanh or sigmoid, LeCun for SELU, a truncated normal for GELU and SiLU,
    Xavier with gain 1 where nothing follows, and He (with the slope of a leaky ReLU) otherwise.

    Args:
        weight: at least two dimensions, output features first.
        policy: see :class:`lightning_distill.callbacks.InitPolicy`.
        activation: name of the activation that follows.
        slope: its negative slope, for a leaky ReLU.
        std: standard deviation of the truncated normal.
        generator: source of the random numbers.

    Example:
        >>> weight = torch.empty(256, 128)
        >>> init_weight_(weight, "auto", "relu", 0.0, 0.02, torch.Generator().manual_seed(0))
        'kaiming_normal'
        >>> round(weight.std().item(), 3), round((2 / 128) ** 0.5, 3)
        (0.125, 0.125)
    """
    if policy == "auto":
        policy = {
            "tanh": "xavier_normal",
            "sigmoid": "xavier_normal",
            "linear": "xavier_normal",
            "selu": "lecun_normal",
            "gelu": "transformer",
            "silu": "transformer",
        }.get(activation, "kaiming_normal")
    if policy.startswith("xavier"):
        gain = _gain(activation) if activation in ("tanh", "sigmoid") else 1.0
        getattr(nn.init, f"{policy}_")(weight, gain=gain, generator=generator)
    elif policy.startswith("kaiming"):
        getattr(nn.init, f"{policy}_")(weight, a=slope, nonlinearity="leaky_relu", generator=generator)
    elif policy.startswith("lecun"):
        name = policy.replace("lecun", "kaiming")
        getattr(nn.init, f"{name}_")(weight, nonlinearity="linear", generator=generator)
    elif policy == "orthogonal":
        gain = _gain(activation, slope)
        nn.init.orthogonal_(weight, gain, generator=generator)
    else:
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    return policy


def _gain(activation: str, slope: float = 0.0) -> float:
    if activation in ("gelu", "silu"):  # torch knows no gain for them
        return 1.0
    return float(nn.init.calculate_gain(activation, slope if activation == "leaky_relu" else None))  # type: ignore[arg-type]


@torch.no_grad()
def initialize(
    model: nn.Module, policy: Policy = "auto", patterns: list[str] | None = None, *, std: float = 0.02, seed: int = 0
) -> list[Initialized]:
    """Initialise a model in place: weights by the policy, biases zero, norms one, embeddings normal, padding rows zero.

    Tied weights are drawn once, at their first name. The numbers depend on the seed alone and not on the process.

    Args:
        model: the model; its parameters must hold memory.
        policy: the rule for linear and convolutional layers.
        patterns: patterns on names of modules; only modules that match one are touched. None touches all.
        std: standard deviation for embeddings and for the truncated normal of transformers.
        seed: seed of the random numbers.

    Returns:
        One line for each weight drawn.

    Raises:
        ValueError: unknown policy, a parameter on the meta device, or a pattern that matches no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
        >>> line = initialize(model, "auto")[0]
        >>> line.activation, line.rule, round(line.target_std, 4), model[0].bias.abs().max().item()
        ('tanh', 'xavier_normal', 0.2083, 0.0)
    """
    if policy not in get_args(Policy):
        raise ValueError(f"Expected argument `policy` to be one of {', '.join(get_args(Policy))}, but got {policy!r}")
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"Expected argument `only` to match names of modules, but {pattern!r} matches none")
    activations = following_activations(model)
    generator, done, audit = torch.Generator(), set[int](), list[Initialized]()
    generator.manual_seed(seed)
    for name, module in model.named_modules():
        if patterns is not None and not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(module, (*_LAYERS, *_NORMS, nn.Embedding)) or weight is None or id(weight) in done:
            continue
        if weight.is_meta:
            raise ValueError(
                f"Expected the parameters of argument `model` to hold memory, but got {name!r} on the meta device; "
                "initialise after `to_empty`"
            )
        done.add(id(weight))
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
        if isinstance(module, _NORMS):
            nn.init.ones_(weight)
            continue
        activation, slope = activations.get(name, ("linear", 0.0))
        # Drawn on the CPU, so that a device does not change the numbers.
        drawn = torch.empty(weight.shape)
        if isinstance(module, nn.Embedding):
            rule, target = "normal", std
            nn.init.normal_(drawn, std=std, generator=generator)
            if module.padding_idx is not None:
                drawn[module.padding_idx] = 0
        else:
            rule = init_weight_(drawn, policy, activation, slope, std, generator)
            target = _target_std(drawn, rule, activation, slope, std)
        weight.copy_(drawn)
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(drawn)
        audit.append(Initialized(f"{name}.weight", activation, rule, fan_in, fan_out, target, drawn.std().item()))
    return audit


def _target_std(weight: Tensor, rule: str, activation: str, slope: float, std: float) -> float:
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    if rule.startswith("xavier"):
        gain = _gain(activation) if activation in ("tanh", "sigmoid") else 1.0
        return gain * (2 / (fan_in + fan_out)) ** 0.5
    if rule.startswith("kaiming"):
        return (2 / (1 + slope**2) / fan_in) ** 0.5
    if rule.startswith("lecun"):
        return fan_in**-0.5
    if rule == "orthogonal":
        gain = _gain(activation, slope)
        return gain * max(weight.shape[0], weight[0].numel()) ** -0.5
    return 0.8796 * std  # a normal cut at two standard deviations
