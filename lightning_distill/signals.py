"""What one forward leaves behind, for only the layers and kinds that are asked for.

The model keeps its own fast attention. Hidden states come from hooks on the layers that are asked for; queries, keys
and values come from an attention function that is registered with transformers, calls the model's own one and keeps
what it was called with.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_distill.attention import Attention, attach, detach, why_unrecorded

if TYPE_CHECKING:
    # They are made of functions whose package imports this file.
    from lightning_distill.functional.projection import TopK
    from lightning_distill.vocabulary import Deferred


@dataclass(frozen=True)
class Request:
    """The signals of one model that somebody reads.

    Args:
        hidden_states: Layers (from 0) whose output is kept.
        embedding: Whether the input of the first layer is kept.
        attention: Layers (from 0), or paths of layers, whose queries, keys and values are kept.
        modules: Paths of submodules whose output is kept.

    Example:
        >>> from lightning_distill.signals import Request
        >>> sorted((Request(hidden_states=frozenset({1})) | Request(hidden_states=frozenset({0}))).hidden_states)
        [0, 1]
    """

    hidden_states: frozenset[int] = frozenset()
    embedding: bool = False
    attention: frozenset[int | str] = frozenset()
    modules: frozenset[str] = frozenset()

    def __or__(self, other: "Request") -> "Request":
        return Request(*(getattr(self, f.name) | getattr(other, f.name) for f in dataclasses.fields(self)))


class Captured(TypedDict):
    """What a :class:`Recorder` hands over; the keys are the fields of :class:`Signals`."""

    hidden_states: dict[int, Tensor]
    embedding: Tensor | None
    attention: dict[int | str, Attention]
    modules: dict[str, Tensor]


@dataclass
class Signals:
    """What one forward of one model left behind.

    Args:
        logits: Shape ``[B, C]`` or ``[B, T, C]``.
        labels: Shape of the logits without their last dimension; where they are probabilities of classes, or of several
            values in regression, that of the logits. None where there are none.
        mask: Bool, where the logits count; shape of the labels, or None where all count.
        token_mask: Bool ``[B, T]``, the real tokens of the input, or None where all are.
        hidden_states: Output ``[B, T, D]`` of a layer, by layer (from 0). The last layer's is the output of the whole
            stack, so after its final norm where it has one, as in transformers' ``last_hidden_state``.
        embedding: Input ``[B, T, D]`` of the first layer.
        attention: Queries, keys and values, by layer or its path.
        modules: Output of a submodule, by its path.
        decoder: Path of the decoder of an encoder-decoder, see :func:`find_decoder`.
        decoder_token_mask: Bool ``[B, T]``, the real tokens that the decoder reads, or None where all are.
        top_k: The k best classes of a teacher whose logits were not kept, by temperature; those above then have
            width 0.
        deferred: Logits over a large vocabulary that were not computed; those above then have width 0.
        regression: Whether the logits are real values, each with a label of its own, and no classes.
        offsets: Integer ``[B, T, 2]``, where in the text each token of the input begins and ends; None where the batch
            does not say.
    """

    logits: Tensor
    labels: Tensor | None = None
    mask: Tensor | None = None
    token_mask: Tensor | None = None
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None
    attention: dict[int | str, Attention] = field(default_factory=dict)
    modules: dict[str, Tensor] = field(default_factory=dict)
    decoder: str | None = None
    decoder_token_mask: Tensor | None = None
    top_k: dict[float, "TopK"] = field(default_factory=dict)
    deferred: "Deferred | None" = None
    regression: bool = False
    offsets: Tensor | None = None

    def real_tokens(self, key: int | str | None) -> Tensor | None:
        """Bool mask of the tokens that a layer, or the module at a path, reads; None where all are real."""
        return self.decoder_token_mask if is_within(key, self.decoder) else self.token_mask


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
        no_layers: Why a transformers model has no depth; None where it has one, and for any other module.
        no_attention: Why the attention of its layers cannot be recorded; None where it can.
    """

    depth: int | None = None
    width: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    head_width: int | None = None
    modules: dict[str, int | None] = field(default_factory=dict)
    decoder: str | None = None
    no_layers: str | None = None
    no_attention: str | None = None


def describe(model: nn.Module) -> ModelInfo:
    """Read depth, width and heads off a transformers config, and the output widths of submodules off their classes.

    Args:
        model: Any module; one without a transformers config has only ``modules``.

    Returns:
        What is known.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.signals import describe
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
        modules=modules,
        decoder=find_decoder(model),
        no_layers=no_layers,
        no_attention=no_attention,
    )


def find_decoder(model: nn.Module) -> str | None:
    """Path of the decoder in a transformers model that has an encoder too; None in any other.

    Layers that are numbered are the encoder's; those of the decoder are named by their paths, such as
    ``"decoder.block.2"``.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> from lightning_distill.signals import find_decoder
        >>> find_decoder(T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, vocab_size=8)))
        'decoder'
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    seq2seq: Any = model
    decoder = seq2seq.get_decoder()
    return next((path for path, module in model.named_modules() if module is decoder), None)


def is_within(key: int | str | None, path: str | None) -> bool:
    """Whether a key is the path of a module or of something inside it."""
    return isinstance(key, str) and path is not None and f"{key}.".startswith(f"{path}.")


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
        >>> from lightning_distill.signals import find_layers
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
        >>> len(find_layers(BertModel(config)))
        3
    """
    return _find_stack(model)[1]


def _find_stack(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
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


def _width(module: nn.Module) -> int | None:
    for name in ("out_features", "out_channels", "num_features", "embedding_dim"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    shape = getattr(module, "normalized_shape", None)
    return shape[-1] if isinstance(shape, tuple) else None


class Recorder:
    """Keeps the requested signals of each forward of a model until they are taken.

    Outputs of the model are the same bits with and without it. A forward that is run again by gradient checkpointing
    during backward is not recorded. The model can be copied, pickled and compiled (``model.compile()``) after
    :meth:`remove`, and is as it was before.

    Args:
        model: A transformers model, or any module where the request has only ``modules``.
        request: What to keep.

    Raises:
        ValueError: If the model cannot give what is requested.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.signals import Recorder, Request
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> recorder = Recorder(model, Request(modules=frozenset({"1"})))
        >>> _ = model(torch.zeros(5, 4))
        >>> recorder.take()["modules"]["1"].shape
        torch.Size([5, 8])
        >>> recorder.remove()
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.model, self.request = model, request
        self._captured: dict[tuple[str, Any], Any] = {}
        self._recording = False
        self._grad_mode = True
        self._handles: list[RemovableHandle] = []
        wanted = request.hidden_states | {layer for layer in request.attention if isinstance(layer, int)}
        if wanted or request.embedding:
            owner, layers = _find_stack(model)
            if beyond := sorted(layer for layer in wanted if not 0 <= layer < len(layers)):
                raise ValueError(
                    f"Expected argument `request` to name layers of the model, but got {beyond} for a "
                    f"`{type(model).__name__}` of {len(layers)} layers. Layers count from 0."
                )
            for layer in request.hidden_states:
                self._handles.append(layers[layer].register_forward_hook(partial(self._keep_output, layer)))
            if len(layers) - 1 in request.hidden_states:
                self._handles.append(owner.register_forward_hook(partial(self._keep_last, len(layers) - 1)))
            if request.embedding:
                self._handles.append(layers[0].register_forward_pre_hook(self._keep_embedding, with_kwargs=True))
        for key in request.attention:
            attach(self._layer(key), partial(self._keep_attention, key))
        for path in request.modules:
            module = get_submodule(model, path)
            self._handles.append(module.register_forward_hook(partial(self._keep_module, path)))
        # Last, so that the owner of the stack, which may be the model itself, is still recorded when it returns.
        self._handles.append(model.register_forward_pre_hook(self._begin))
        self._handles.append(model.register_forward_hook(self._end))

    def take(self) -> Captured:
        """Hand over what the last forward left behind, and forget it.

        Returns:
            The captured signals.

        Raises:
            RuntimeError: If something that was requested did not run, or was recorded without a gradient inside
                reentrant gradient checkpointing.
        """
        captured, self._captured = self._captured, {}
        kinds: dict[str, dict[Any, Any]] = {"hidden_states": {}, "embedding": {}, "attention": {}, "modules": {}}
        for (kind, key), value in captured.items():
            kinds[kind][key] = value
        for kind in ("hidden_states", "attention", "modules"):
            if missing := sorted(getattr(self.request, kind) - kinds[kind].keys(), key=str):
                raise RuntimeError(
                    f"Expected the last forward of `{type(self.model).__name__}` to give `{kind}` of {missing}, but it "
                    "did not run them. Call the model itself, once, before taking its signals."
                )
        return Captured(
            hidden_states=kinds["hidden_states"],
            embedding=kinds["embedding"].get(None),
            attention=kinds["attention"],
            modules=kinds["modules"],
        )

    def remove(self) -> None:
        """Take every hook off the model and give it its own attention function back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captured.clear()
        for key in self.request.attention:
            detach(self._layer(key))

    def _layer(self, key: int | str) -> nn.Module:
        return get_submodule(self.model, key) if isinstance(key, str) else find_layers(self.model)[key]

    def _begin(self, module: nn.Module, args: Any) -> None:
        # Kept only between these two hooks: what gradient checkpointing runs again in backward is outside of them.
        self._captured.clear()
        self._recording = True
        self._grad_mode = torch.is_grad_enabled()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._recording = False

    def _keep(self, kind: str, key: Any, value: Any) -> None:
        if not self._recording:
            return
        if self._grad_mode and not torch.is_grad_enabled():
            raise RuntimeError(
                f"Expected `{kind}` of {key} to be recorded with a gradient, but the layer runs inside reentrant "
                "gradient checkpointing. Turn that on with `use_reentrant=False`."
            )
        self._captured[kind, key] = value

    def _keep_output(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        self._keep("hidden_states", layer, _first_tensor(output))

    def _keep_last(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        if state is not None:
            self._keep("hidden_states", layer, state)

    def _keep_embedding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep("embedding", None, args[0] if args else kwargs["hidden_states"])

    def _keep_attention(self, layer: int | str, attention: Attention) -> None:
        # A decoder layer attends to itself first and to the encoder after: the first is the one that is meant.
        if ("attention", layer) not in self._captured:
            self._keep("attention", layer, attention)

    def _keep_module(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        self._keep("modules", path, _first_tensor(output))


def capture(model: nn.Module, request: Request, *args: Any, **kwargs: Any) -> tuple[Any, Captured]:
    """Run a model once and keep the requested signals.

    Args:
        model: The model.
        request: What to keep.
        *args: For the model.
        **kwargs: For the model.

    Returns:
        The model's output and what it left behind.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.signals import Request, capture
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> output, captured = capture(model, Request(modules=frozenset({"0"})), torch.zeros(5, 4))
        >>> captured["modules"]["0"].shape
        torch.Size([5, 8])
    """
    recorder = Recorder(model, request)
    try:
        return model(*args, **kwargs), recorder.take()
    finally:
        recorder.remove()


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
        >>> from lightning_distill.signals import get_submodule
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


def _first_tensor(output: Any) -> Tensor:
    value = output if isinstance(output, Tensor) else output[0]
    assert isinstance(value, Tensor)
    return value
