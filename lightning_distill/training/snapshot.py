"""Keep everything a training step can change in some objects, and put it back bit for bit."""

import copy
import os
import random
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset


class Snapshot:
    """The state of some objects at one moment, to be restored into the same objects.

    Kept are all attributes of each object and, for a module, of its submodules: the values of tensors (parameters,
    buffers, whatever else), their gradients, numbers, and what lists, dictionaries, sets and random generators hold,
    nested to any depth. Objects of other classes keep their identity and are not looked into; name them too if training
    changes them. Restoring works in place: every tensor and container stays the object it was, so optimizers, tied
    weights and other references stay right. Of a ``DTensor`` each process keeps its own shard.

    Args:
        objects: modules, optimizers, schedules, callbacks, trainers: anything with attributes.
        file: where to keep the values of tensors; None keeps them in host memory.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> snapshot = Snapshot([model])
        >>> before = model.weight.detach().clone()
        >>> _ = nn.init.ones_(model.weight)
        >>> snapshot.restore()
        >>> torch.equal(model.weight, before)
        True
    """

    def __init__(self, objects: Iterable[object], file: Path | None = None) -> None:
        self._seen: dict[int, object] = {}
        self._undo: list[Callable[[], object]] = []
        self._tensors: list[Tensor] = []
        for thing in objects:
            for part in thing.modules() if isinstance(thing, nn.Module) else [thing]:
                self._keep(vars(part))
        self._file = file
        values = [_local(tensor).detach() for tensor in self._tensors]
        if file is None:
            self._values = [value.to("cpu", copy=True) for value in values]
        else:
            torch.save(values, file)

    @staticmethod
    def num_bytes(objects: Iterable[object]) -> int:
        """Bytes of the tensors that modules and optimizers among ``objects`` hold, counted once each."""
        tensors: dict[int, Tensor] = {}
        for thing in objects:
            if isinstance(thing, nn.Module):
                tensors |= {id(tensor): tensor for tensor in [*thing.parameters(), *thing.buffers()]}
            elif isinstance(thing, torch.optim.Optimizer):
                state = [value for values in thing.state.values() for value in values.values()]
                tensors |= {id(value): value for value in state if isinstance(value, Tensor)}
        return sum(_local(tensor).nbytes for tensor in tensors.values())

    def restore(self) -> None:
        """Put everything back; can be called once or many times."""
        values = self._values if self._file is None else torch.load(self._file, mmap=True, weights_only=True)
        for undo in self._undo:
            undo()
        with torch.no_grad():
            for tensor, value in zip(map(_local, self._tensors), values, strict=True):
                value = value.to(tensor.device)
                # An expanded buffer cannot be written to, and hardly ever needs to be.
                expanded = any(step == 0 < size - 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
                if not (expanded and torch.equal(tensor, value)):
                    tensor.copy_(value)

    def _keep(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, dict):
            items = dict(value)
            self._undo.append(lambda: _refill(value, value.update, items))
            self._keep_all(value, items.values())
        elif isinstance(value, list | deque):
            parts = list(value)
            self._undo.append(lambda: _refill(value, value.extend, parts))
            self._keep_all(value, parts)
        elif isinstance(value, set):
            members = set(value)
            self._undo.append(lambda: _refill(value, value.update, members))
            self._seen[id(value)] = value
        elif isinstance(value, tuple):
            self._keep_all(value, value)
        elif isinstance(value, np.ndarray):
            array = value.copy()
            self._undo.append(lambda: value.__setitem__(..., array) if value.flags.writeable else None)
            self._seen[id(value)] = value
        elif isinstance(value, torch.Generator | np.random.Generator | random.Random):
            self._undo.append(generator_restorer(value))
            self._seen[id(value)] = value

    def _keep_all(self, container: object, values: Iterable[Any]) -> None:
        self._seen[id(container)] = container  # holding the object keeps its id from being used again
        for value in values:
            self._keep(value)

    def _keep_tensor(self, tensor: Tensor) -> None:
        self._seen[id(tensor)] = tensor
        if tensor.is_meta or (tensor.requires_grad and not tensor.is_leaf):
            return
        self._tensors.append(tensor)
        if tensor.is_leaf:
            requires_grad, grad = tensor.requires_grad, tensor.grad
            self._undo.append(lambda: setattr(tensor.requires_grad_(requires_grad), "grad", grad))
            if grad is not None:
                self._keep(grad)


def generator_restorer(generator: torch.Generator | np.random.Generator | random.Random) -> Callable[[], object]:
    """A function that puts a random generator back to where it is now.

    Example:
        >>> generator = random.Random(0)
        >>> restore = generator_restorer(generator)
        >>> first = generator.random()
        >>> _ = restore()
        >>> generator.random() == first
        True
    """
    if isinstance(generator, torch.Generator):
        position = generator.get_state()
        return lambda: generator.set_state(position)
    if isinstance(generator, random.Random):
        place = generator.getstate()
        return lambda: generator.setstate(place)
    bits, state = generator.bit_generator, copy.deepcopy(generator.bit_generator.state)
    return lambda: setattr(bits, "state", state)


def copy_loader(loader: Any) -> Any:
    """A loader that draws the batches the given one would, and leaves the given one where it is.

    Samplers, batch samplers, generators and iterable data sets are copied with their positions; a map-style data set,
    the collate function and the function that starts workers are shared. A loader that cannot be copied is returned as
    it is, and so are plain lists and tuples of batches.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(range(6), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))
        >>> [batch.tolist() for batch in copy_loader(loader)] == [batch.tolist() for batch in loader]
        True
    """
    if isinstance(loader, list | tuple):
        return loader
    shared = [getattr(loader, name, None) for name in ("collate_fn", "worker_init_fn")]
    data_set = getattr(loader, "dataset", None)
    # Workers that are alive belong to the original; the copy starts its own.
    workers: dict[int, Any] = {id(loader._iterator): None} if getattr(loader, "_iterator", None) is not None else {}
    for share_data in (False, True) if isinstance(data_set, IterableDataset) else (True,):
        kept = [*shared, data_set] if share_data else shared
        try:
            return copy.deepcopy(loader, {id(thing): thing for thing in kept} | workers)
        except (TypeError, RuntimeError, NotImplementedError, AttributeError):
            continue
    return loader


def available_host_memory() -> int | None:
    """Bytes of memory a process may still take on this machine; None where that cannot be told."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        try:
            available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


def _refill(container: Any, add: Callable[[Any], object], items: object) -> None:
    container.clear()
    add(items)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
