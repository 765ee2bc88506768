"""Queries, keys and values of attention layers that stay on their fast implementation."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from lightning_distill.functional.attention import Attention

_SUFFIX = "_with_signals"
_SINK = "_attention_sink"


def attach(layer: nn.Module, sink: Callable[[Attention], None]) -> None:
    """Hand what the attention of a layer is called with to a function, from the next forward on.

    Args:
        layer: A layer of a transformers model, in place.
        sink: Called inside the forward.

    Raises:
        ValueError: If the layer has no attention that goes through transformers' attention interface, or the model's
            attention implementation is neither ``"sdpa"`` nor ``"eager"``.
    """
    if (reason := why_unrecorded(layer)) is not None:
        raise ValueError(f"Expected a layer whose attention can be recorded, but {reason}. Use hidden states.")
    configs = _configs(layer)
    for config in configs:
        implementation = str(config._attn_implementation).removesuffix(_SUFFIX)
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"Expected a model whose attention can be recorded, but got `attn_implementation={implementation!r}`. "
                'Load it with `attn_implementation="sdpa"`.'
            )
        config._attn_implementation = implementation + _SUFFIX
    for module in layer.modules():
        setattr(module, _SINK, sink)
    if not configs:
        raise ValueError(
            f"Expected a layer with attention, but got a `{type(layer).__name__}` that has none. Use another signal."
        )


def why_unrecorded(layer: nn.Module) -> str | None:
    """Why the attention of a layer cannot be recorded, as the end of a sentence; None where it can.

    Transformers' attention interface is used by the code of most models, and left out where attention is more than a
    softmax of queries and keys (DeBERTa, XLNet, Longformer) or there is none (Mamba, FNet).

    Example:
        >>> from transformers import DebertaV2Config, DebertaV2Model
        >>> from lightning_distill.signals.attention import why_unrecorded
        >>> config = DebertaV2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> why_unrecorded(DebertaV2Model(config).encoder.layer[0])
        "`DebertaV2Layer` computes its attention in a way of its own, not by transformers' attention interface"
    """
    if any(hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS") for module in layer.modules()):
        return None
    return (
        f"`{type(layer).__name__}` computes its attention in a way of its own, not by transformers' attention interface"
    )


def detach(layer: nn.Module) -> None:
    """Undo :func:`attach`.

    Args:
        layer: The layer, in place.
    """
    for config in _configs(layer):
        config._attn_implementation = str(config._attn_implementation).removesuffix(_SUFFIX)
    for module in layer.modules():
        module.__dict__.pop(_SINK, None)


def _configs(layer: nn.Module) -> list[Any]:
    found = (getattr(module, "config", None) for module in layer.modules())
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> None:
    sink = getattr(module, _SINK, None)
    if sink is None:
        return
    for unknown in ("softcap", "s_aux"):
        if kwargs.get(unknown) is not None:
            raise ValueError(
                f"Expected a model with plain softmax attention, but got one with `{unknown}`. Use hidden states."
            )
    is_causal = kwargs.get("is_causal")
    scaling = kwargs.get("scaling")
    groups = query.shape[1] // key.shape[1]
    sink(
        Attention(
            query=query,
            key=key.repeat_interleave(groups, dim=1) if groups > 1 else key,
            value=value.repeat_interleave(groups, dim=1) if groups > 1 else value,
            mask=attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            is_causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
            position_bias=kwargs.get("position_bias"),
        )
    )


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    _record(module, query, key, value, attention_mask, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    _record(module, query, key, value, attention_mask, **kwargs)
    # Eager attention is not registered: each model's file has its own.
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("sdpa" + _SUFFIX, _sdpa)
AttentionInterface.register("eager" + _SUFFIX, _eager)
AttentionMaskInterface.register("sdpa" + _SUFFIX, sdpa_mask)
AttentionMaskInterface.register("eager" + _SUFFIX, eager_mask)
