"""Recorder: hooks that keep the requested signals of each forward."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_distill.functional.attention import Attention
from lightning_distill.signals.attention import attach, detach
from lightning_distill.signals.description import find_layers, get_submodule, layer_stack
from lightning_distill.signals.signals import Captured, Request


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
        >>> from lightning_distill.signals.recorder import Recorder
        >>> from lightning_distill.signals.signals import Request
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
            owner, layers = layer_stack(model)
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
        >>> from lightning_distill.signals.signals import Request
        >>> from lightning_distill.signals.recorder import capture
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


def _first_tensor(output: Any) -> Tensor:
    value = output if isinstance(output, Tensor) else output[0]
    assert isinstance(value, Tensor)
    return value
