"""Calibration in one forward per batch: each is suspended at a layer until that layer is quantised."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_distill.models.batch import decoder_token_mask, token_mask
from lightning_distill.models.calling import call_model

Forward = Callable[[nn.Module, Any], Any]
_CROSS = re.compile(r"(encoder_attn|EncDecAttention|crossattention|cross_attention).*\.(k|v|key|value|k_proj|v_proj)$")


def input_groups(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, forward: Forward) -> list[list[str]]:
    """Names of the layers in the order a forward meets them; those given the same tensor are one group."""
    seen: dict[Any, list[str]] = {}
    met: set[str] = set()
    alive: list[Tensor] = []  # an address may be used again once its tensor is gone

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            alive.append(inputs)
            if name not in met:
                met.add(name)
                # torch's encoder nests rows of different lengths; such a tensor has no shape.
                shape = None if inputs.is_nested else (tuple(inputs.shape), inputs.stride())
                key = (inputs.data_ptr(), shape, inputs._version)
                seen.setdefault(key, []).append(name)

        return hook

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen.values())


class _Stop(BaseException):
    """Ends a suspended forward whose rest nobody needs."""


class _SuspendedForward(threading.Thread):
    def __init__(self, model: nn.Module, batch: Any, forward: Forward) -> None:
        super().__init__(daemon=True)
        self.model, self.batch, self.call = model, batch, forward
        self.layer: str | None = None  # where it waits
        self.inputs: Tensor | None = None
        self.error: BaseException | None = None
        self.stopping = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self.stopping:
                with torch.no_grad():  # grad mode belongs to a thread
                    self.call(self.model, self.batch)
        except _Stop:
            pass
        except BaseException as error:
            self.error = error
        self.layer = self.inputs = None
        self._back.release()

    def wait_at(self, layer: str, inputs: Tensor) -> None:
        self.layer, self.inputs = layer, inputs
        self._back.release()
        self._go.acquire()
        if self.stopping:
            raise _Stop

    def advance(self) -> None:
        """Run on to the next layer that waits for its quantisation, or to the end; then return."""
        self._go.release()
        self._back.acquire()
        if self.error is not None:
            raise self.error


def calibrate(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], forward: Forward = call_model
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Give each layer's calibration inputs, in forward order, computed by the layers before it as they are by then.

    Every batch's forward runs in a thread of its own, one at a time, and waits where it meets a layer. When all wait,
    the layer and those with the same input are yielded; the caller changes their weights in place, and all go on. So
    the model runs once over the data, whatever its architecture, and what is kept is what the suspended forwards hold:
    the inputs of one layer and what its block still needs. A module that stores something on itself in its forward and
    reads it after a later layer would read another batch's: such a model needs all samples in one batch.

    Args:
        model: Any module, in eval mode.
        layers: The layers to stop at, by name.
        batches: What ``forward`` takes; padding is told by ``attention_mask`` and left out.
        forward: Calls the model on a batch.

    Yields:
        Names of the layers with this input, and per batch the real tokens' inputs ``[tokens, width]``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.quantization.calibration import calibrate
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> for names, inputs in calibrate(model, {"0": model[0], "1": model[1]}, [torch.ones(3, 4)]):
        ...     print(names, inputs[0].shape)
        ['0'] torch.Size([3, 4])
        ['1'] torch.Size([3, 8])
    """
    groups = input_groups(model, layers, batches[0], forward)
    # Routed past by the first batch, perhaps not by all: behind the layer that the module tree has before it.
    behind = -1
    for name in layers:
        found = next((position for position, group in enumerate(groups) if name in group), None)
        behind = behind + 1 if found is None else found
        if found is None:
            groups.insert(behind, [name])
    place = {name: position for position, group in enumerate(groups) for name in group}
    done: set[int] = set()

    def stop_at(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if place[name] not in done:
                thread = threading.current_thread()
                assert isinstance(thread, _SuspendedForward)
                thread.wait_at(name, args[0])

        return hook

    hooks = [layer.register_forward_pre_hook(stop_at(name)) for name, layer in layers.items()]
    threads = [_SuspendedForward(model, batch, forward) for batch in batches]
    try:
        for thread in threads:
            thread.start()
            thread.advance()
        while waiting := [thread for thread in threads if thread.layer is not None]:
            position = min(place[thread.layer] for thread in waiting if thread.layer)
            here = [thread for thread in waiting if thread.layer and place[thread.layer] == position]
            yield groups[position], [_real_tokens(thread, groups[position]) for thread in here]
            done.add(position)
            if len(done) == len(groups):
                return
            for thread in here:
                thread.advance()
    finally:
        for hook in hooks:
            hook.remove()
        for thread in threads:
            thread.stopping = True
            thread._go.release()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _real_tokens(thread: _SuspendedForward, names: list[str]) -> Tensor:
    inputs = thread.inputs
    assert inputs is not None
    if inputs.is_nested:
        return torch.cat(inputs.unbind())  # real tokens alone
    rows = inputs.reshape(-1, inputs.shape[-1])
    if not isinstance(thread.batch, Mapping):
        return rows
    masks = [token_mask(thread.batch), decoder_token_mask(thread.batch)]
    if any("decoder" in name for name in names) and not any(_CROSS.search(name) for name in names):
        masks.reverse()
    for mask in masks:
        if mask is not None and mask.ndim == 2 and mask.numel() == len(rows):
            return rows[mask.reshape(-1).to(rows.device)]
    return rows


def first_batches(dataloader: Iterable[Any], num_samples: int, device: torch.device) -> list[Any]:
    """The first rows of a dataloader, in its batches, on a device.

    Raises:
        ValueError: If it has none.
    """
    batches: list[Any] = []
    count = 0
    for batch in dataloader:
        if count >= num_samples:
            break
        batches.append(apply_to_collection(batch, Tensor, lambda x, rows=num_samples - count: x[:rows].to(device)))
        count += _rows(batches[-1])
    if not count:
        raise ValueError("Expected argument `dataloader` to give calibration batches, but it gave none.")
    return batches


def _rows(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((_rows(value) for value in values if isinstance(value, (Tensor, Mapping, tuple, list))), 0)
