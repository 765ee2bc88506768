"""A dry run: some steps of the Trainer's own loop, after which everything is put back bit for bit."""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset

from lightning_distill.functional.tensors import local


def dry_run(
    trainer: Any,
    recorder: L.Callback,
    active: Sequence[L.Callback] = (),
    *,
    max_steps: int,
    val_batches: int = 0,
    file: Path | None = None,
) -> None:
    """Train with other callbacks until one sets ``trainer.should_stop``, then put everything back bit for bit.

    Steps go through the Trainer's own loop, so precision, strategy, accumulation and manual optimization are the real
    ones; the user's loggers and all callbacks but the given ones are out of it, and so are the schedules, except in
    manual optimization, where the user's own code steps them. A checkpoint could not put everything back: it leaves out
    attributes of the module and of the Trainer, generators of loaders and states of metrics.

    Args:
        trainer: a Trainer at or after ``on_train_start``.
        recorder: the callback that watches, and sets ``trainer.should_stop``; all it gathers is kept.
        active: callbacks that take part; they are put back too.
        max_steps: the most optimizer steps it will take.
        val_batches: validation batches after each optimizer step; 0 for no validation.
        file: where to keep the values of tensors meanwhile; None keeps them in host memory.
    """
    with isolate_rng():
        snapshot = Snapshot([*stateful_parts(trainer), *active], file)
        try:
            _run(trainer, [recorder, *active], max_steps, val_batches)
        finally:
            for part in trainer.lightning_module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()  # a validation at the end leaves the root gathered
            snapshot.restore()
            if file is not None:
                file.unlink()


def stateful_parts(trainer: Any) -> list[object]:
    """What training changes, other than callbacks and loaders."""
    plugin = trainer.precision_plugin
    parts = [trainer, trainer.lightning_module, trainer.strategy, plugin, getattr(plugin, "scaler", None)]
    parts += [trainer.datamodule, *trainer.optimizers, *(config.scheduler for config in trainer.lr_scheduler_configs)]
    return [part for part in parts if part is not None]


class _DryLoop(_FitLoop):
    """A fit loop with counters of its own that only ends when told to, however short the real training is."""

    @property
    def done(self) -> bool:
        return self.trainer.should_stop


def _run(trainer: Any, callbacks: list[L.Callback], max_steps: int, val_batches: int) -> None:
    # The loops that wait for us keep their iterators: these are others, over copies of the loaders.
    waiting, loop = trainer.fit_loop, _DryLoop(trainer, max_epochs=trainer.max_epochs)
    loop.epoch_loop.max_steps = -1 if waiting.max_steps == -1 else max(max_steps, waiting.max_steps)
    loop._data_source = _copied(waiting)
    trainer.fit_loop = loop
    trainer.callbacks = callbacks
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    trainer._logger_connector = type(trainer._logger_connector)(trainer)
    if trainer.lightning_module.automatic_optimization:
        trainer.strategy.lr_scheduler_configs = []
    trainer.limit_val_batches = val_batches
    if val_batches:
        loop.epoch_loop.val_loop._data_source = _copied(waiting.epoch_loop.val_loop)
        trainer.check_val_every_n_epoch, trainer._val_check_time_interval = None, None
        trainer.val_check_interval = trainer.accumulate_grad_batches
    loop.run()
    loop.teardown()


def _copied(loop: Any) -> Any:
    """The source of a loop's batches, with copies of its loaders."""
    loaders = loop._combined_loader
    if loaders is None:
        given = loop._data_source.dataloader()
        loaders = given if isinstance(given, CombinedLoader) else CombinedLoader(given, "max_size_cycle")
    copies = copy.copy(loaders)
    copies.flattened = [copy_loader(loader) for loader in loaders.flattened]
    return replace(loop._data_source, instance=copies)


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
    for kept in ([shared] if isinstance(data_set, IterableDataset) else []) + [[*shared, data_set]]:
        try:
            return copy.deepcopy(loader, {id(thing): thing for thing in kept} | workers)
        except (TypeError, RuntimeError, NotImplementedError, AttributeError):
            continue
    return loader


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
        values = [local(tensor).detach() for tensor in self._tensors]
        if file is None:
            self._values = [value.to("cpu", copy=True) for value in values]
        else:
            torch.save(values, file)

    def restore(self) -> None:
        """Put everything back; can be called once or many times."""
        values = self._values if self._file is None else torch.load(self._file, mmap=True, weights_only=True)
        for undo in self._undo:
            undo()
        with torch.no_grad():
            for tensor, value in zip(map(local, self._tensors), values, strict=True):
                value = value.to(tensor.device)
                # An expanded buffer cannot be written to, and hardly ever needs to be.
                expanded = any(step == 0 < size - 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
                if not (expanded and torch.equal(tensor, value)):
                    tensor.copy_(value)

    def _keep(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value  # holding the object keeps its id from being used again
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, dict | list | deque | set):
            items = dict(value) if isinstance(value, dict) else list(value)
            self._undo.append(partial(_refill, value, items))
        elif isinstance(value, np.ndarray):
            array = value.copy()
            self._undo.append(lambda: value.__setitem__(..., array) if value.flags.writeable else None)
        elif isinstance(value, torch.Generator):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            self._undo.append(partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state)))
        if isinstance(value, dict | list | deque | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                self._keep(part)

    def _keep_tensor(self, tensor: Tensor) -> None:
        if tensor.is_meta or (tensor.requires_grad and not tensor.is_leaf):
            return
        self._tensors.append(tensor)
        if tensor.is_leaf:
            requires_grad, grad = tensor.requires_grad, tensor.grad
            self._undo.append(lambda: setattr(tensor.requires_grad_(requires_grad), "grad", grad))
            if grad is not None:
                self._keep(grad)


def _refill(container: Any, items: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(items)


def num_bytes(objects: Iterable[object]) -> int:
    """Bytes of the tensors that modules and optimizers among some objects hold, counted once each."""
    tensors: list[Any] = []
    for thing in objects:
        if isinstance(thing, nn.Module):
            tensors += [*thing.parameters(), *thing.buffers()]
        elif isinstance(thing, torch.optim.Optimizer):
            tensors += [value for values in thing.state.values() for value in values.values()]
    return sum(local(t).nbytes for t in {id(t): t for t in tensors if isinstance(t, Tensor)}.values())


def available_host_memory() -> int | None:
    """Bytes of memory a process may still take on this machine; None where that cannot be told (not on Linux)."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))
