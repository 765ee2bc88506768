"""Run some steps of the Trainer's own loop, and leave no trace of them."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.distributed.fsdp import FSDPModule

from lightning_distill.training.snapshot import Snapshot, copy_loader


def rehearse(
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
    manual optimization, where the user's own code steps them.

    Args:
        trainer: a Trainer at or after ``on_train_start``.
        recorder: the callback that watches, and sets ``trainer.should_stop``; all it gathers is kept.
        active: callbacks that take part; they are put back too.
        max_steps: the most optimizer steps it will take.
        val_batches: validation batches after each optimizer step; 0 for no validation.
        file: where to keep the values of tensors meanwhile; None keeps them in host memory.
    """
    module = trainer.lightning_module
    with isolate_rng():
        snapshot = Snapshot([*stateful_parts(trainer), *active], file)
        try:
            _run(trainer, [recorder, *active], max_steps, val_batches)
        finally:
            for part in module.modules():
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


class _Rehearsal(_FitLoop):
    """A fit loop with counters of its own that only ends when told to, however short the real training is."""

    @property
    def done(self) -> bool:
        return self.trainer.should_stop


def _run(trainer: Any, callbacks: list[L.Callback], max_steps: int, val_batches: int) -> None:
    # The loops that wait for us keep their iterators: these are others, over copies of the loaders.
    waiting, loop = trainer.fit_loop, _Rehearsal(trainer, max_epochs=trainer.max_epochs)
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
