"""Find the activation that follows each layer of a model: by tracing, or by what a transformers config says."""

import re
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Modules with a weight that maps features to features. Conv1D is GPT-2's linear layer, with its weight transposed.
LAYERS = (nn.Linear, *_CONVOLUTIONS, Conv1D)
#: Names of the layers that open the feed-forward part of a numbered block, in torch, transformers and timm.
OPENS = re.compile(r"\.\d+\.(.*\.)?(intermediate\.dense|lin1|linear1|fc1|up_proj|gate_proj|c_fc|Wi|wi|wi_0|wi_1)$")
_KNOWN = {"relu", "leaky_relu", "selu", "tanh", "sigmoid", "gelu", "silu"}
_OTHER = {name.lower() for name in torch.nn.modules.activation.__all__ if "Attention" not in name} - _KNOWN
_OTHER |= {"hardtanh", "softplus", "log_softmax", "mish", "elu", "celu", "prelu"}
_SYNONYMS = {"leakyrelu": "leaky_relu", "swish": "silu", "gelunew": "gelu", "gelu_new": "gelu", "relu2": "relu"}
# What a config calls the activation of its feed-forward layers.
_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn", "act_fn")

Following = tuple[str, float]
"""An activation and its negative slope."""


def following_activations(model: nn.Module) -> dict[str, Following]:
    """The activation that follows each layer with weights, and its negative slope, by the layer's name.

    A model of transformers says in its config which activation it has. Where that is GELU or SiLU every layer counts as
    followed by it, as such models are initialised by one rule; otherwise those that open a feed-forward part do, and
    the others are linear. Anything else (a ResNet of transformers too) is traced with ``torch.fx``, and each layer's
    output is followed through whatever lies between; of what cannot be traced as a whole the parts are, and between
    them counts the order in which they were registered. ``"linear"`` is a layer that meets another layer, or the end,
    first; ``"unknown"`` one of which neither can be told, or whose activation has no rule of its own.

    Args:
        model: any module.

    Example:
        >>> following_activations(nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(0.2), nn.Linear(3, 1)))
        {'0': ('leaky_relu', 0.2), '2': ('linear', 0.0)}
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> following_activations(BertModel(config))["encoder.layer.0.intermediate.dense"]
        ('gelu', 0.0)
    """
    found = _in_registration_order(model) | _known(model, whole=True)
    return {name: found[name] for name in _layers(model)}


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LAYERS)]


def _known(model: nn.Module, *, whole: bool) -> dict[str, Following]:
    """By layer, of those parts of a model that say it, or that can be traced."""
    if isinstance(model, PreTrainedModel) and (by_config := _by_config(model)):
        return by_config
    if isinstance(model, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        activation = model.activation
        name = getattr(activation, "__name__", type(activation).__name__.lower())
        return {"linear1": _following(name, 0.0) or ("unknown", 0.0)}
    traced = _by_tracing(model)
    if traced is None:
        parts = [(name, _known(child, whole=False)) for name, child in model.named_children()]
        return {f"{part}.{name}": following for part, known in parts for name, following in known.items()}
    if whole:
        return {name: traced.get(name) or ("linear", 0.0) for name in _layers(model)}
    return {name: following for name, following in traced.items() if following is not None}


def _by_config(model: PreTrainedModel) -> dict[str, Following]:
    text, activation = model.config.get_text_config(), "unknown"
    for field in _FIELDS:
        value = getattr(text, field, None)
        if isinstance(value, str):
            value = value.lower().replace("quick_gelu", "gelu").replace("gated-gelu", "gelu")
            activation = next((known for known in ("leaky_relu", *_KNOWN) if value.startswith(known)), value)
            activation = _SYNONYMS.get(activation, activation)
            break
    names = _layers(model)
    if activation in ("gelu", "silu"):
        return dict.fromkeys(names, (activation, 0.0))
    opening = {name for name in names if OPENS.search(f".{name}")}
    return {name: (activation if name in opening else "linear", 0.0) for name in names} if opening else {}


class _Tracer(fx.Tracer):
    """Goes past the hooks of modules, which may do anything (FSDP2's begin to shard), and not into a layer."""

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return super().call_module(m, m.forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LAYERS) or super().is_leaf_module(m, module_qualified_name)


def _by_tracing(model: nn.Module) -> dict[str, Following | None] | None:
    """By layer that is called: what follows it, None for one that reaches the output; None if it cannot be traced."""
    if isinstance(model, LAYERS) or not list(model.children()):
        return None
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a model's own code raises on a symbolic value
        return None
    modules, found = dict(model.named_modules()), dict[str, Following | None]()
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], LAYERS):
            found[str(node.target)] = _downstream(node, modules)
    return found


def _downstream(node: fx.Node, modules: dict[str, nn.Module]) -> Following | None:
    queue, seen, met_layer = list(node.users), set(), False
    while queue:
        user = queue.pop(0)
        if user in seen:
            continue
        seen.add(user)
        if user.op == "call_module":
            module = modules[str(user.target)]
            if isinstance(module, LAYERS):
                met_layer = True
                continue
            following = _of_module(module)
        else:
            name = getattr(user.target, "__name__", str(user.target)).rstrip("_")
            slope = user.kwargs.get("negative_slope", 0.01) if name == "leaky_relu" else 0.0
            following = _following(name, float(str(slope)))
        if following is not None:
            return following
        queue += user.users
    return ("linear", 0.0) if met_layer else None


def _in_registration_order(model: nn.Module) -> dict[str, Following]:
    found: dict[str, Following] = {}
    waiting = None
    for name, module in model.named_modules():
        following = _of_module(module)
        if isinstance(module, LAYERS):
            found[name] = ("unknown", 0.0)
            waiting = name
        elif waiting is not None and following is not None:
            found[waiting] = following
            waiting = None
    return found


def _of_module(module: nn.Module) -> Following | None:
    name = type(module).__name__.lower().removeprefix("fsdp").removesuffix("activation")
    return _following(name, float(getattr(module, "negative_slope", 0.0)))


def _following(name: str, slope: float) -> Following | None:
    """An activation by its name; None for what is no activation."""
    name = _SYNONYMS.get(name, name)
    if name in _KNOWN:
        return name, slope
    return ("unknown", 0.0) if name in _OTHER else None
