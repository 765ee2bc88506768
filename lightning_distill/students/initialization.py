"""Initialise weights by a named rule, or by the activation that follows each layer."""

import math
import re
import zlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_distill.arguments import between, one_of
from lightning_distill.functional.tensors import fill_
from lightning_distill.students.activations import LAYERS, OPENS, Following, following_activations

Policy = Literal[
    "auto", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "lecun_normal", "lecun_uniform",
    "orthogonal", "transformer",
]  # fmt: skip
Residual = Literal["gpt2", "deepnorm"]
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_AUTO = dict.fromkeys(("tanh", "sigmoid", "linear"), "xavier_normal") | {"selu": "lecun_normal"}
_AUTO |= dict.fromkeys(("gelu", "silu"), "transformer")
# Layers of a numbered block that write to its residual stream and that make values, by the names they have in torch,
# transformers and timm.
_WRITES = re.compile(
    r"\.\d+\.(.*\.)?(output\.dense|out_proj|o_proj|c_proj|Wo|wo|out_lin|lin2|down_proj|linear2|fc2|o)$"
)
_VALUES = re.compile(r"\.\d+\.(.*\.)?(value|v_proj|v_lin|v)$")
_JOINT = re.compile(r"\.\d+\.(.*\.)?(c_attn|Wqkv|qkv)$")


@dataclass
class Initialized:
    """One line of the audit: what was found, what was done, and what came out."""

    parameter: str
    activation: str
    rule: str
    fan_in: int
    fan_out: int
    target_std: float | None
    measured_std: float

    as_dict = asdict


def init_weight_(
    weight: Tensor, policy: str, activation: str, slope: float, std: float, generator: Generator
) -> tuple[str, float]:
    """Fill one weight in place by a rule.

    Args:
        weight: at least two dimensions, output features first.
        policy: see :class:`lightning_distill.callbacks.InitPolicy`; or ``"normal"``, as embeddings are drawn.
        activation: name of the activation that follows.
        slope: its negative slope, for a leaky ReLU.
        std: standard deviation of the two normal ones.
        generator: source of the random numbers.

    Returns:
        The rule that it was, and the standard deviation that the rule aims at.

    Example:
        >>> weight = torch.empty(256, 128)
        >>> rule, target = init_weight_(weight, "auto", "relu", 0.0, 0.02, torch.Generator().manual_seed(0))
        >>> rule, round(target, 3), round(weight.std().item(), 3)
        ('kaiming_normal', 0.125, 0.125)
    """
    rule = _AUTO.get(activation, "kaiming_normal") if policy == "auto" else policy
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    if rule == "transformer":
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        return rule, 0.8796 * std  # a normal cut at two standard deviations
    if rule == "orthogonal":
        gain = _gain(activation, slope)
        nn.init.orthogonal_(weight, gain, generator=generator)
        return rule, gain * max(weight.shape[0], weight[0].numel()) ** -0.5
    if rule == "normal":
        target = std
    elif rule.startswith("xavier"):
        target = (_gain(activation) if activation in ("tanh", "sigmoid") else 1.0) * math.sqrt(2 / (fan_in + fan_out))
    elif rule.startswith("kaiming"):
        target = _gain("leaky_relu", slope) / math.sqrt(fan_in)
    else:
        target = 1 / math.sqrt(fan_in)
    if rule.endswith("uniform"):
        weight.uniform_(-math.sqrt(3) * target, math.sqrt(3) * target, generator=generator)
    else:
        weight.normal_(0, target, generator=generator)
    return rule, target


def _gain(activation: str, slope: float = 0.0) -> float:
    if activation in ("gelu", "silu", "unknown"):  # torch knows no gain for them
        return 1.0
    return float(nn.init.calculate_gain(activation, slope if activation == "leaky_relu" else None))  # type: ignore[arg-type]


def generator_for(name: str, seed: int) -> Generator:
    """The source of a parameter's random numbers: they depend on the seed and its name, and on nothing else.

    So they are the same on every rank, however the model is sharded, and whichever parameter is drawn first.

    Example:
        >>> torch.equal(*(torch.rand(2, generator=generator_for("head.weight", 1)) for _ in range(2)))
        True
    """
    # One hash of both: of a seed, torch's generator on the CPU reads 32 bits.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


@torch.no_grad()
def initialize(
    model: nn.Module,
    policy: Policy = "auto",
    names: Collection[str] | None = None,
    *,
    std: float | None = None,
    residual: Residual | None = None,
    seed: int = 0,
) -> list[Initialized]:
    r"""Initialise a model in place: weights by the policy, biases zero, norms one, embeddings normal, padding rows 0.

    Tied weights are drawn once, at their first name. Parameters of other modules (gates of an RNN, the joint
    projection of ``MultiheadAttention``, free ones) keep what their class gave them.

    With :math:`R` layers that write to the residual stream (two a block), ``residual="gpt2"`` multiplies their
    weights by :math:`1 / \sqrt{R}`, and ``"deepnorm"`` those, the values' and the feed-forward's by
    :math:`\beta = (4 R)^{-1/4}`; with ``policy="xavier_normal"`` that is DeepNorm's initialisation. Its other half is
    the model's: it has to multiply its residual by :math:`\alpha = R^{1/4}`.

    Args:
        model: the model; its parameters must hold memory.
        policy: the rule for linear and convolutional layers.
        names: names of the parameters that may be touched; None: all.
        std: standard deviation for embeddings and the truncated normal; None takes the ``initializer_range`` of the
            transformers config around, or 0.02.
        residual: scaling by depth.
        seed: seed of the random numbers, see :func:`generator_for`.

    Returns:
        One line for each weight drawn.

    Raises:
        ValueError: unknown policy, a parameter on the meta device, or no layer that ``residual`` could scale.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
        >>> line = initialize(model, "auto")[0]
        >>> line.activation, line.rule, round(line.target_std, 4), model[0].bias.abs().max().item()
        ('tanh', 'xavier_normal', 0.2083, 0.0)

    Source: Glorot and Bengio 2010 (Xavier); He et al. 2015; Klambauer et al. 2017 (LeCun for SELU); Saxe et al. 2014
    (orthogonal); Radford et al. 2019, section 2.3 (GPT-2); Wang et al., "DeepNet", 2022 (DeepNorm).
    """
    one_of("policy", policy, get_args(Policy))
    if std is not None:
        between("std", std, 0)
    factors = {} if residual is None else residual_factors(model, residual)
    activations, done, audit = following_activations(model), set[int](), list[Initialized]()
    configs = {name: part.config for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    for name, module in model.named_modules():
        if not isinstance(module, (*LAYERS, *NORMS, nn.Embedding)):
            continue
        for kind in ("weight", "bias"):
            parameter, full_name = getattr(module, kind, None), f"{name}.{kind}" if name else kind
            left = names is not None and full_name not in names
            if not isinstance(parameter, nn.Parameter) or id(parameter) in done or left:
                continue
            if parameter.is_meta:
                raise ValueError(
                    f"Expected the parameters of argument `model` to hold memory, but got {full_name!r} on the meta "
                    "device; see `materialize`."
                )
            done.add(id(parameter))
            if kind == "bias" or isinstance(module, NORMS):
                nn.init.constant_(parameter, float(kind == "weight"))
                continue
            around = next((configs[part] for part in configs if not part or name.startswith(f"{part}.")), None)
            spread = std or getattr(around, "initializer_range", None) or 0.02
            following = activations.get(name, ("linear", 0.0))
            rule = "normal" if isinstance(module, nn.Embedding) else policy
            audit.append(_draw(module, full_name, rule, following, spread, factors.get(name), seed))
    return audit


def _draw(
    module: Any, name: str, rule: str, following: Following, std: float, factor: tuple[float, float] | None, seed: int
) -> Initialized:
    shape, transposed = module.weight.shape, isinstance(module, Conv1D)
    # Drawn on the CPU, so that a device does not change the numbers.
    drawn = torch.empty(shape[::-1] if transposed else shape)
    rule, target = init_weight_(drawn, rule, *following, std, generator_for(name, seed))
    if getattr(module, "padding_idx", None) is not None:
        drawn[module.padding_idx] = 0
    if factor is not None:
        times, rows = factor
        drawn[int(len(drawn) * (1 - rows)) :] *= times
        rule, target = f"{rule} x {times:.3g}", target * (times**2 * rows + 1 - rows) ** 0.5
    fill_(module.weight, drawn.T if transposed else drawn)
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(drawn)
    measured = drawn.std().item() if drawn.numel() > 1 else 0.0
    return Initialized(name, following[0], rule, fan_in, fan_out, target, measured)


def residual_factors(model: nn.Module, residual: Residual) -> dict[str, tuple[float, float]]:
    """By layer name: what its weight is multiplied by, and the share of its last rows that this is for.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=9))
        >>> residual_factors(model, "gpt2")["h.1.mlp.c_proj"]
        (0.5, 1.0)
    """
    one_of("residual", residual, get_args(Residual))
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    writes = [name for name in layers if _WRITES.search(name)]
    if not writes:
        raise ValueError(
            f"Expected argument `residual` to be None for a model without residual blocks of known names, but got "
            f"{residual!r}; its layers look like {layers[:2]}."
        )
    if residual == "gpt2":
        return dict.fromkeys(writes, (len(writes) ** -0.5, 1.0))
    beta = (4 * len(writes)) ** -0.25
    scaled = dict.fromkeys([*writes, *(n for n in layers if _VALUES.search(n) or OPENS.search(n))], (beta, 1.0))
    return scaled | dict.fromkeys((name for name in layers if _JOINT.search(name)), (beta, 1 / 3))


@torch.no_grad()
def materialize(model: nn.Module) -> None:
    """Give parameters and buffers on the meta device memory on the CPU, with what their classes begin with.

    Args:
        model: any module; the parts of it that hold memory are left alone.

    Raises:
        ValueError: a module has tensors on the meta device and can neither reset them nor is of transformers.

    Example:
        >>> with torch.device("meta"):
        ...     layer = nn.Linear(2, 2)
        >>> materialize(layer)
        >>> layer.weight.device.type
        'cpu'
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                owners.setdefault(id(parameter), []).append((module, name))
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and any(tensor.is_meta for tensor in _tensors(part)):
            part.to_empty(device="cpu")
            for module in part.modules():
                vars(module).pop("_is_hf_initialized", None)
            part.initialize_weights()
    for name, module in model.named_modules():
        if any(tensor.is_meta for tensor in _tensors(module, recurse=False)):
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if not callable(reset):
                raise ValueError(
                    f"Expected the modules of argument `model` on the meta device to have `reset_parameters`, but got "
                    f"{name!r}, a `{type(module).__name__}`; build it with memory."
                )
            module.to_empty(device="cpu", recurse=False)
            reset()
    for (first, first_name), *others in owners.values():
        for module, name in others:  # tied as they were
            setattr(module, name, getattr(first, first_name))


def _tensors(module: nn.Module, recurse: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]
