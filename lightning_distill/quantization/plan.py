"""Which layers of a model are quantised, and how: patterns of names, what the format can hold, what is left and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_distill.arguments import between, one_of
from lightning_distill.quantization.gptq import BITS
from lightning_distill.quantization.linear import why_not_packable
from lightning_distill.quantization.replaceable import why_not_replaceable

#: Heads, poolers, ramps, routers and adapters: few bytes, and errors there are not made good by anything after them.
EXCLUDE = (
    *("lm_head", "head", "classifier", "pre_classifier", "classification_head", "pooler", "score", "cls"),
    *("qa_outputs", "embed_out", "vocab_*", "ramp", "ramps", "gate", "router"),
    "lora_*",  # adapters are small, and what they learned is smaller than a step of their weights' grid
)


@dataclass
class LayerReport:
    """What quantising one layer cost.

    Attributes:
        name: The layer's name in the model.
        shape: ``(out, in)``.
        bits: Bits of its codes; 0 if it was left in floating point.
        group_size: Inputs that share a scale.
        error: Relative squared error of its output on the calibration inputs; with ``asymmetric`` from the output that
            makes good what the layers before have lost.
        rounding_error: The same for rounding to nearest.
        seconds: Time, shared out by outputs among the layers with one input.
        note: What was done otherwise than asked, and why; empty where nothing was.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    error: float
    rounding_error: float
    seconds: float
    note: str = ""


def check_options(
    bits: int,
    group_size: int,
    embedding_bits: int | None,
    bits_by_pattern: Mapping[str, int] | None,
    group_size_by_pattern: Mapping[str, int] | None,
    num_samples: int,
    damp_percent: float,
    true_sequential: bool,
    asymmetric: bool | None,
) -> None:
    """Refuse what :func:`quantize` cannot do."""
    between("damp_percent", damp_percent, 0, 1, closed=True)
    one_of("bits", bits, BITS)
    one_of("group_size", group_size, (-1, 32, 64, 128))
    for value in (bits_by_pattern or {}).values():
        one_of("bits_by_pattern", value, (*BITS, 0))
    for value in (group_size_by_pattern or {}).values():
        one_of("group_size_by_pattern", value, (-1, 32, 64, 128))
    if embedding_bits not in (None, 4, 8):
        raise ValueError(f"Expected argument `embedding_bits` to be None, 4 or 8, but got {embedding_bits}.")
    if num_samples < 1:
        raise ValueError(f"Expected argument `num_samples` to be at least 1, but got {num_samples}.")
    if asymmetric and not true_sequential:
        raise ValueError(
            "Expected argument `asymmetric` to come with `true_sequential`, as it makes good what the layers before "
            "have lost, but got true_sequential=False."
        )


@dataclass
class Plan:
    """What becomes of the linear layers of a model.

    Attributes:
        layers: Those that were asked for, by their first name.
        aliases: Of each, every name that shares its weight.
        settings: Bits and group size of those that are quantised.
        notes: What is done otherwise than asked for some of these.
        left: Reports of those that stay in floating point.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    left: dict[str, LayerReport] = field(default_factory=dict)


def plan(
    model: nn.Module,
    include: Sequence[str],
    exclude: Sequence[str],
    bits: int,
    group_size: int,
    bits_by_pattern: Mapping[str, int],
    group_size_by_pattern: Mapping[str, int],
) -> Plan:
    """Say what becomes of each linear layer that the patterns name.

    Raises:
        ValueError: If none is to be quantised.
    """
    made, first = Plan(), dict[int, str]()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, Conv1D)) and matches(name, include) and not matches(name, exclude):
            # A layer that shares its weight, or its all, with another one is quantised with it.
            shared = module.weight if why_not_replaceable(module) is None else module
            owner = first.setdefault(id(shared), name)
            made.aliases.setdefault(owner, []).append(name)
            made.layers.setdefault(owner, module)
    held = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, layer in made.layers.items():
        reason = why_not_replaceable(layer)
        if reason is None and id(layer.weight) in held:
            reason = "an embedding has the same weight"
        if reason is not None:
            made.left[name] = left(name, reason)
            continue
        rows, width = weight_of(layer).shape
        layer_bits, size = (
            _by_pattern(name, bits_by_pattern, bits),
            _by_pattern(name, group_size_by_pattern, group_size),
        )
        reason = why_not_packable(width, rows, layer_bits or 4)
        if reason or not layer_bits:
            made.left[name] = replace(left(name, reason or "asked for"), shape=(rows, width), group_size=size)
            continue
        fitting = next(size for size in (size, 64, 32) if size == -1 or width % size == 0)
        made.settings[name] = (layer_bits, fitting)
        if fitting != size:
            made.notes[name] = f"group {size} does not divide {width}"
    if not made.settings:
        raise ValueError(
            f"Expected arguments `include` {list(include)}, `exclude` {list(exclude)} and `bits_by_pattern` "
            f"{dict(bits_by_pattern)} to leave linear layers that the format can hold, but none is left of "
            f"{len(made.layers)}; their widths must divide by 32."
        )
    return made


def left(name: str, reason: str) -> LayerReport:
    """The report of a layer that stays as it is."""
    return LayerReport(name, (0, 0), 0, 0, 0.0, 0.0, 0.0, f"left in floating point: {reason}")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern of ``fnmatch`` fits a layer's whole name or one part of it between dots."""
    parts = (name, *name.split("."))
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in parts)


def _by_pattern(name: str, values: Mapping[str, int], default: int) -> int:
    return next((value for pattern, value in values.items() if matches(name, (pattern,))), default)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight ``[out, in]``."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias, if there is one."""
    assert layer.bias is None or isinstance(layer.bias, Tensor)
    return layer.bias
