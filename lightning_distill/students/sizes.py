"""Which fields of a config say how many layers a model has and how wide it is, found by changing one at a time."""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.models.calling import accepted
from lightning_distill.signals.description import find_decoder
from lightning_distill.students.axes import Axis, kind_of, units

Size = int | list[int]
Field = tuple[str, str]
"""The name of a sub-config ("" where there are none), and of a field in it."""
# Fields that say how many heads there are: shapes cannot tell, as many classes have `hidden_size // heads` a head.
_HEADS = re.compile(r"(num|n|attention|value|global)_heads?$")
_LENGTH = 7


@dataclass(frozen=True)
class Depth:
    """A field that says how many layers there are, or how many in each stage.

    Args:
        field: Where it stands.
        layers: What it says.
        stacks: Paths of each ``ModuleList`` of these layers, one a stage; none where no stack tells.
        of_decoder: Whether they are those of the decoder of an encoder-decoder.
        groups: Where layers share their weights (ALBERT): the field that says how many have weights of their own.
    """

    field: Field
    layers: Size
    stacks: tuple[str, ...] = ()
    of_decoder: bool = False
    groups: Field | None = None

    @property
    def total(self) -> int:
        """Layers of all stages."""
        return self.layers if isinstance(self.layers, int) else sum(self.layers)


def build(kind: Any, config: Any) -> nn.Module:
    """A model on the meta device whose attention and experts are computed by plain operators."""
    with torch.device("meta"):
        model = kind(copy.deepcopy(config)).eval()
    model.set_attn_implementation("eager")
    if getattr(model.config.get_text_config(), "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")
    return model


def towers(config: Any) -> dict[str, Any]:
    """The configs that say sizes: the sub-configs of a model of several parts, or the config itself, named ``""``."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}}
    sized = {name: part for name, part in parts.items() if getattr(part, "hidden_size", None) is not None}
    return sized or {"": config}


def with_fields(config: Any, values: dict[Field, Any]) -> Any:
    """A copy of a config with other values in some fields."""
    changed = copy.deepcopy(config)
    for (tower, name), value in values.items():
        setattr(getattr(changed, tower) if tower else changed, name, copy.copy(value))
    return changed


def field_of(config: Any, field: Field) -> Any:
    """What a config says in a field."""
    return getattr(getattr(config, field[0]) if field[0] else config, field[1])


def _fields(config: Any) -> Iterator[tuple[Field, Size]]:
    for tower, part in towers(config).items():
        for name, value in vars(part).items():
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if numbers and all(type(number) is int and number > 0 for number in numbers) and not name.startswith("_"):
                yield (tower, name), value if isinstance(value, int) else list(numbers)


def _each(size: Size, change: Any) -> Any:
    return change(size) if isinstance(size, int) else [change(number) for number in size]


def in_list(size: Size) -> list[int]:
    """A size by stage; of what has no stages in a list of one.

    Example:
        >>> in_list(3), in_list([1, 2])
        ([3], [1, 2])
    """
    return [size] if isinstance(size, int) else size


@dataclass(frozen=True)
class _Told:
    """A config that is another's equal where it says the same."""

    text: str
    config: Any = field(compare=False)


def depths(kind: Any, config: Any) -> list[Depth]:
    """The fields that say how many layers a transformers model has.

    A stack of layers that is one shorter where a field is one less belongs to that field.

    Args:
        kind: The model's class.
        config: Its config.

    Returns:
        One for each; ``num_hidden_layers`` where no stack tells.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> small = {"d_model": 8, "d_ff": 8, "vocab_size": 8, "num_heads": 1, "d_kv": 8}
        >>> config = T5Config(num_layers=3, num_decoder_layers=2, **small)
        >>> [(found.field[1], found.layers, found.stacks) for found in depths(T5ForConditionalGeneration, config)]
        [('num_layers', 3, ('encoder.block',)), ('num_decoder_layers', 2, ('decoder.block',))]
    """
    return list(_depths(kind, _Told(config.to_json_string(use_diff=False), copy.deepcopy(config))))


@lru_cache(maxsize=64)
def _depths(kind: Any, told: _Told) -> list[Depth]:
    config, model = told.config, build(kind, told.config)
    all_stacks, decoder = _stacks(model), find_decoder(model)
    found = []
    for where, value in _fields(config):
        if not set(in_list(value)) <= set(all_stacks.values()):
            continue
        changed = with_fields(config, {where: _each(value, lambda number: number - 1 or 2)})
        try:
            stacks = _stacks(build(kind, changed))
        except Exception:  # whatever a constructor raises where the field is of something else
            continue
        other = tuple(path for path, length in all_stacks.items() if stacks.get(path, length) != length)
        if isinstance(value, int):
            other = tuple(path for path in other if not re.search(r"\.\d", path))
        if other and (isinstance(value, int) or len(other) == len(value)):
            found.append(Depth(where, value, other, decoder is not None and other[0].startswith(f"{decoder}.")))
    staged = {depth.field[0] for depth in found if isinstance(depth.layers, list)}
    found = [depth for depth in found if depth.field[0] not in staged or isinstance(depth.layers, list)]
    found = [_shared(kind, config, depth) or depth for depth in found]
    known = {depth.field[0] for depth in found}
    for tower, part in towers(config).items():
        if tower not in known and isinstance(layers := getattr(part, "num_hidden_layers", None), int):
            found.append(Depth((tower, _own_name(part, "num_hidden_layers")), layers))
    return found


def _shared(kind: Any, config: Any, depth: Depth) -> Depth | None:
    """The number of layers where a stack is of groups of layers that share their weights; None where it is not."""
    tower, part = depth.field[0], towers(config)[depth.field[0]]
    field = (tower, _own_name(part, "num_hidden_layers"))
    layers = getattr(part, field[1], None)
    if field == depth.field or not isinstance(layers, int) or not isinstance(depth.layers, int):
        return None
    for number in (layers, layers + 1):
        try:
            run = _run(build(kind, with_fields(config, {field: number})), depth.stacks[0])
        except Exception:  # whatever a constructor or a forward raises where the field is of something else
            return None
        if run != [group_of(layer, number, depth.layers) for layer in range(number)]:
            return None
    return replace(depth, field=field, layers=layers, groups=depth.field)


def _run(model: nn.Module, stack: str) -> list[int]:
    """Which layer of a stack a forward runs first, second and so on."""
    run: list[int] = []
    for index, layer in enumerate(model.get_submodule(stack).children()):
        layer.register_forward_hook(lambda *_, index=index: run.append(index))
    with torch.no_grad():
        model(**inputs(model))
    return run


def group_of(layer: int, layers: int, groups: int) -> int:
    """Whose weights a layer has where layers share them in groups, as ALBERT counts.

    Example:
        >>> [group_of(layer, 5, 2) for layer in range(5)]
        [0, 0, 0, 1, 1]
    """
    return int(layer / (layers / groups))


def _stacks(model: nn.Module) -> dict[str, int]:
    return {path: len(module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}


def _own_name(config: Any, name: str) -> str:
    return str(getattr(config, "attribute_map", {}).get(name, name))


def widths(kind: Any, config: Any) -> dict[Field, Size]:
    """The fields that shrink with the width: the hidden size, heads, and inner sizes.

    An inner size is one by which channels or neurons get more that one weight writes and another reads: not the words,
    the positions or the classes, nor the size of a head.

    Args:
        kind: The model's class.
        config: Its config.

    Returns:
        What they say.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> widths(BertModel, BertConfig(num_hidden_layers=1))
        {('', 'hidden_size'): 768, ('', 'num_attention_heads'): 12, ('', 'intermediate_size'): 3072}
    """
    return dict(_widths(kind, _Told(config.to_json_string(use_diff=False), copy.deepcopy(config))))


@lru_cache(maxsize=64)
def _widths(kind: Any, told: _Told) -> dict[Field, Size]:
    config = told.config
    base = dict(build(kind, config).named_parameters())
    lengths = {size for parameter in base.values() for size in parameter.shape}
    hidden = {name: (_own_name(part, "hidden_size"), part) for name, part in towers(config).items()}
    found: dict[Field, Size] = {}
    for where, value in _fields(config):
        own, part = hidden[where[0]]
        if where[1] == own or _HEADS.search(where[1]):
            found[where] = value
        elif set(in_list(value)) & lengths and not where[1].endswith("_id"):
            equal = value == getattr(part, "hidden_size", None)
            if _is_inner(
                kind, with_fields(config, {where: _each(value, lambda number: 2 * number)}), base, value, equal
            ):
                found[where] = value
    return found


def _is_inner(kind: Any, config: Any, base: Mapping[str, Tensor], value: Size, equals_hidden: bool) -> bool:
    try:
        model = build(kind, config)
    except Exception:  # whatever a constructor raises where the field cannot be doubled
        return False
    parameters = dict(model.named_parameters())
    if equals_hidden and parameters.keys() != base.keys():
        return True  # a projection is there where the two differ (OPT): where they do not, they go together
    axes = changed_axes(parameters, base)
    if not axes:
        return False
    try:
        found = units(model, axes, inputs(model))
    except NotImplementedError:
        raise
    except Exception:  # whatever a forward raises between parts of two sizes: this one goes with the hidden size
        return equals_hidden
    kinds: dict[Any, int] = {}
    for unit in found:
        kinds[kind_of(unit)] = kinds.get(kind_of(unit), 0) + 1
    doubled = {2 * number for number in in_list(value)}
    return any(number in doubled and _is_between(kind, model) for kind, number in kinds.items())


def _is_between(kind: tuple[tuple[Axis, int], ...], model: nn.Module) -> bool:
    weights = {name for (name, _), _ in kind if model.get_parameter(name).ndim > 1}
    return len(weights) > 1 and min(count for _, count in kind) == 1


def changed_axes(big: Mapping[str, Any], small: Mapping[str, Any]) -> dict[Axis, int]:
    """The axes of parameters that two models have in common, and differ in; with their sizes in the first."""
    return {
        (name, axis): size
        for name, parameter in big.items()
        if name in small and parameter.ndim == small[name].ndim
        for axis, size in enumerate(parameter.shape)
        if size != small[name].shape[axis]
    }


def scaled(sizes: dict[Field, Size], width: float) -> dict[Field, Size]:
    """Sizes at a share of the width.

    Raises:
        ValueError: If the width is out of range or leaves a fraction of a head, a channel or a neuron.

    Example:
        >>> scaled({("", "hidden_size"): 8, ("", "num_attention_heads"): 2}, 0.5)
        {('', 'hidden_size'): 4, ('', 'num_attention_heads'): 1}
    """
    if not 0 < width <= 1:
        raise ValueError(f"Expected argument `width` to be in (0, 1], but got {width}.")
    # Every size must stay whole, so the width is a multiple of one over their greatest common divisor.
    steps = width_steps(sizes)
    nearest = min(max(1, round(width * steps)), steps)
    if abs(width * steps - nearest) > 1e-6:
        said = {".".join(filter(None, field)): size for field, size in sizes.items()}
        raise ValueError(
            f"Expected argument `width` to keep heads and neurons whole (a multiple of 1/{steps} of the teacher's "
            f"{said}), but got {width}. The nearest is {nearest}/{steps} = {nearest / steps:.4g}."
        )
    return {field: _each(size, lambda number: number * nearest // steps) for field, size in sizes.items()}


def width_steps(sizes: dict[Field, Size]) -> int:
    """In how many steps the width can grow to the teacher's.

    Example:
        >>> width_steps({("", "hidden_size"): 768, ("", "num_attention_heads"): 12})
        12
    """
    return math.gcd(*(number for size in sizes.values() for number in in_list(size)))


def inputs(model: Any) -> dict[str, Tensor]:
    """A row for a model on the meta device, of what its forward takes."""
    names, config = accepted(model), model.config
    vision = getattr(config, "vision_config", None) or config
    row: dict[str, Tensor] = {}
    for name in ("input_ids", "decoder_input_ids"):
        if name in names and (name == "input_ids" or getattr(config, "is_encoder_decoder", False)):
            row[name] = torch.zeros(1, _LENGTH, dtype=torch.long, device="meta")
    if "pixel_values" in names:
        sides = vision.image_size if isinstance(vision.image_size, (list, tuple)) else [vision.image_size] * 2
        row["pixel_values"] = torch.empty(1, vision.num_channels, *sides, device="meta")
    if "input_features" in names:
        row["input_features"] = torch.empty(1, config.num_mel_bins, 2 * config.max_source_positions, device="meta")
    return row
