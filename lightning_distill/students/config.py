"""How a model of an architecture that is not known here is made smaller by hand, as lines of Python."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_distill.signals.description import find_layers

_DEPTHS = ("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers", "num_encoder_layers")
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads")
_STAGES = ("block_sizes", "depths")


def by_hand(model: nn.Module) -> str:
    """Lines that make a model of about half the size out of `teacher`, a transformers model.

    What makes a model smaller differs: an encoder-decoder has two depths, CLIP a config for each of its towers, stages
    have a list of depths, and where layers are shared (ALBERT) only less width makes fewer parameters.

    Args:
        model: The teacher.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> from lightning_distill.students.config import by_hand
        >>> config = T5Config(d_model=8, d_ff=8, num_layers=4, vocab_size=8)
        >>> by_hand(T5ForConditionalGeneration(config)).split("; ")[1:3]
        ['config.num_layers = 2', 'config.num_decoder_layers = 2']
    """
    config: Any = getattr(model, "config", None)
    towers = [name for name in getattr(config, "sub_configs", None) or {} if getattr(config, name, None) is not None]
    found = [(f"{name}.{field}", half) for name in towers for field, half in _of_depth(getattr(config, name))]
    if not towers:
        found = list(_of_depth(config))
        too_flat = bool(found) and found[0][1] == 1 == getattr(config, found[0][0])
        if too_flat or (found and not _has_layers_of_its_own(model, config)):
            found = [(name, _half(getattr(config, name))) for name in _WIDTHS if getattr(config, name, 1) % 2 == 0]
        found = found or [("num_hidden_layers", 3)]
    lines = [f"config.{field} = {value}" for field, value in found]
    return "; ".join(["config = copy.deepcopy(teacher.config)", *lines, "student = type(teacher)(config)"])


def _of_depth(config: Any) -> Iterator[tuple[str, Any]]:
    own = vars(config) if config is not None else {}
    if stages := [name for name in _STAGES if isinstance(own.get(name), list | tuple)]:
        yield from ((name, [_half(depth) for depth in own[name]]) for name in stages)
        return
    names = [name for name in _DEPTHS if isinstance(own.get(name), int)] if own.get("is_encoder_decoder") else []
    for name in names or ["num_hidden_layers"]:
        depth = getattr(config, name, None)
        if isinstance(depth, int):
            yield name, _half(depth)
            # What a config says of each layer must be as long.
            if isinstance(types := own.get("layer_types"), list) and len(types) == depth:
                yield "layer_types", types[: _half(depth)]


def _has_layers_of_its_own(model: nn.Module, config: Any) -> bool:
    if getattr(config, "is_encoder_decoder", False) or any(hasattr(config, name) for name in _STAGES):
        return True
    try:
        return len(find_layers(model)) > 0
    except ValueError:
        return False


def _half(size: int) -> int:
    return max(1, size // 2)
