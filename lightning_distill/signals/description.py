"""What can be known of a model without running it: its layers, widths and heads, and where its decoder is."""

import difflib
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_distill.signals.attention import why_unrecorded


@dataclass(frozen=True)
class ModelInfo:
    """What can be known of a model without running it.

    Args:
        depth: Number of layers, or None where the model is no transformers stack of equal layers.
        width: Size of the hidden states.
        num_heads: Number of attention heads.
        num_key_value_heads: Number of key and value heads (smaller where heads are grouped).
        head_width: Width of one attention head.
        modules: Width of every submodule's output by its path; None where its class does not tell.
        decoder: Path of the decoder of an encoder-decoder.
        cross_attention: Paths of the modules in it that attend to the encoder.
        no_layers: Why a transformers model has no depth; None where it has one, and for any other module.
        no_attention: Why the attention of its layers cannot be recorded; None where it can.
        embedding_width: Size of the vector that the model answers with, where it is an embedding model.
    """

    depth: int | None = None
    width: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    head_width: int | None = None
    modules: dict[str, int | None] = field(default_factory=dict)
    decoder: str | None = None
    cross_attention: frozenset[str] = frozenset()
    no_layers: str | None = None
    no_attention: str | None = None
    embedding_width: int | None = None


def describe(model: nn.Module) -> ModelInfo:
    """Read depth, width and heads off a transformers config, and the output widths of submodules off their classes.

    Args:
        model: Any module; one without a transformers config has only ``modules``.

    Returns:
        What is known.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.signals.description import describe
        >>> describe(nn.Sequential(nn.Linear(4, 8), nn.ReLU())).modules
        {'0': 8, '1': None}
    """
    modules = {path: _width(module) for path, module in model.named_modules() if path}
    config = _text_config(model)
    if config is None:
        return ModelInfo(modules=modules)
    depth = no_layers = no_attention = None
    try:
        layers = find_layers(model)
        depth, no_attention = len(layers), why_unrecorded(layers[-1])
    except ValueError as error:
        no_layers = str(error)
    width, num_heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    head_width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    if head_width is None and width and num_heads:
        head_width = width // num_heads
    return ModelInfo(
        depth=depth,
        width=width,
        num_heads=num_heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_width=head_width,
        embedding_width=getattr(model, "embedding_width", None),
        modules=modules,
        decoder=find_decoder(model),
        cross_attention=frozenset(path for path, module in model.named_modules() if _attends_to_encoder(path, module)),
        no_layers=no_layers,
        no_attention=no_attention,
    )


def find_decoder(model: nn.Module) -> str | None:
    """Path of the decoder in a transformers model that has an encoder too; None in any other.

    Layers that are numbered are the encoder's; those of the decoder are named by their paths, such as
    ``"decoder.block.2"``.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> from lightning_distill.signals.description import find_decoder
        >>> find_decoder(T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, vocab_size=8)))
        'decoder'
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    seq2seq: Any = model
    decoder = seq2seq.get_decoder()
    return next((path for path, module in model.named_modules() if module is decoder), None)


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of layers of a transformers model, of its encoder where it has an encoder and a decoder.

    Args:
        model: A transformers model.

    Returns:
        The first ``ModuleList`` that has as many items as the config has layers.

    Raises:
        ValueError: If there is none, as in a plain module or where layers are shared.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_distill.signals.description import find_layers
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
        >>> len(find_layers(BertModel(config)))
        3
    """
    return layer_stack(model)[1]


def layer_stack(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that owns the stack of layers, and the stack."""
    config = _text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    kind = getattr(config, "model_type", None)
    if kind == "xlnet":
        raise ValueError(
            "Expected layers that give `[B, T, D]`, but those of XLNet give `[T, B, D]`. Use an objective on logits."
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return model.get_submodule(path.rpartition(".")[0]), module
    raise ValueError(
        f"Expected a transformers model with a stack of `config.num_hidden_layers` layers, but got a "
        f"`{type(model).__name__}` with {depth} configured layers and no such stack"
        f"{', because its layers share their weights' if kind == 'albert' else ''}. Name modules by path instead."
    )


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(encoder=True) if hasattr(config, "get_text_config") else None


def _attends_to_encoder(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    named = name in ("encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention")
    return named or "CrossAttention" in type(module).__name__


def _width(module: nn.Module) -> int | None:
    for name in ("out_features", "out_channels", "num_features", "embedding_dim"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    shape = getattr(module, "normalized_shape", None)
    return shape[-1] if isinstance(shape, tuple) else None


def get_submodule(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a path.

    Args:
        model: The model.
        path: Its path, as in ``model.named_modules()``.

    Returns:
        The submodule.

    Raises:
        ValueError: If there is none; the message lists the paths that are near.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.signals.description import get_submodule
        >>> get_submodule(nn.Sequential(nn.ReLU()), "0")
        ReLU()
    """
    modules = dict(model.named_modules())
    if path not in modules:
        raise ValueError(
            f"Expected argument `layers` to name modules of `{type(model).__name__}`, but got {path!r}"
            f"{near(path, modules)}"
        )
    return modules[path]


def near(path: str, paths: Any) -> str:
    """End of a sentence that lists the paths nearest to one that does not exist."""
    close = difflib.get_close_matches(path, list(paths), n=3, cutoff=0.4)
    return f"; near it are {close}." if close else "; nothing is near it."
