"""What is wrong with flags, data and models, before anything is written: asked of the flags, then found by a step."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_distill.arguments import integer
from lightning_distill.callbacks import LRFinder, TeacherCache
from lightning_distill.cli.trainer import build_callbacks, make_trainer
from lightning_distill.module import DistillationModule

# They write, or train, where the phase will.
_LEFT_OUT = (LRFinder, TeacherCache)


class _OneStep(L.Callback):
    """Ends the training after its first batch; no checkpoint is written meanwhile but to the folder that goes away."""

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        own = Path(trainer.default_root_dir)
        for callback in list(trainer.callbacks):
            elsewhere = Path(getattr(callback, "dirpath", None) or own / "checkpoints").parent != own
            if isinstance(callback, Checkpoint) and elsewhere:
                trainer.callbacks.remove(callback)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = True


def check_flags(config: Namespace) -> None:
    """Refuse what a recipe cannot do, and numbers that Lightning takes and stumbles over.

    Args:
        config: The parsed flags.

    Raises:
        ValueError: If there is such a flag.
    """
    trainer = config.trainer
    integer("--seed", config.seed, 0, 2**32 - 1)
    integer("--save_every_n_steps", config.save_every_n_steps, 1)
    integer("--trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, 1)
    epochs = {f"--model.{name}": value for name, value in config.model.items() if name.endswith("epochs")}
    lengths = {f"--trainer.{name}": trainer[name] for name in ("max_epochs", "max_steps")}
    for flag, value in (epochs | lengths).items():
        if value is not None and not (value == -1 and flag in lengths):  # the Trainer's word for no end
            integer(flag, value, 1)
    for name in ("limit_train_batches", "limit_test_batches"):
        if trainer[name] == 0:
            raise ValueError(f"--trainer.{name} is 0: a recipe trains and tests on at least a batch")
    for name in ("val_check_interval", "check_val_every_n_epoch"):
        if trainer[name] == 0:
            raise ValueError(f"--trainer.{name} is 0; --trainer.limit_val_batches 0 trains without validation")
    if trainer.barebones:
        raise ValueError("--trainer.barebones keeps no checkpoint and logs nothing; a recipe needs both")
    if isinstance(trainer.strategy, str) and "spawn" in trainer.strategy:
        raise ValueError(f"--trainer.strategy {trainer.strategy} starts processes without the recipe; ddp_fork has it")


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse a Trainer that shards models, or starts more processes than a machine can bear.

    Args:
        trainer: The Trainer that the flags describe.

    Raises:
        ValueError: If it is such a one.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError("--trainer.strategy: a recipe writes whole models; shard in a script of your own")
    cores = os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > max(8, 2 * cores):
        raise ValueError(f"--trainer.devices asks for {trainer.num_devices} processes on a CPU of {cores} cores")


def dry_run(
    parser: ArgumentParser, config: Namespace, make_module: Callable[[], DistillationModule], data: Any, epochs: int
) -> None:
    """Train one step and validate one batch with the Trainer that a phase will have, in a folder that goes away.

    Args:
        parser: The parser that made ``config``.
        config: The parsed flags.
        make_module: Makes a module as the phase's; it is trained.
        data: The data.
        epochs: Of the phase.

    Raises:
        ValueError: If a limit leaves less than a batch; and whatever else the Trainer, the module and its callbacks
            refuse up to the first step.
    """
    for split in ("train", "val", "test"):
        limit = config.trainer[f"limit_{split}_batches"]
        loader = getattr(data, f"{split}_dataloader")
        if isinstance(limit, float) and 0 < limit < 1 and int(limit * (batches := len(loader()))) == 0:
            raise ValueError(f"--trainer.limit_{split}_batches {limit} of {batches} batches is less than one; raise it")
    config = config.clone()
    with tempfile.TemporaryDirectory() as folder, _unannounced():
        config.output_dir, config.resume, config.trainer.logger = Path(folder), False, False
        asked = build_callbacks(config, "dry_run")
        callbacks: list[L.Callback] = [callback for callback in asked if not isinstance(callback, _LEFT_OUT)]
        # There is one in the phase, which the flags may forbid.
        callbacks += [ModelCheckpoint(Path(folder) / "checkpoints"), _OneStep()]
        options: dict[str, Any] = {
            "max_epochs": epochs,
            "min_epochs": None,
            "min_steps": None,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0 if config.trainer.limit_val_batches == 0 else 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "profiler": None,
        }
        trainer = make_trainer(parser, config, "dry_run", callbacks=callbacks, **options)
        if getattr(trainer.strategy.launcher, "is_interactive_compatible", False):
            # An error in a process that this one forks arrives here as a traceback.
            options |= {"strategy": "auto", "devices": 1, "num_nodes": 1}
            trainer = make_trainer(parser, config, "dry_run", callbacks=callbacks, **options)
        trainer.fit(make_module(), datamodule=data)


@contextmanager
def _unannounced() -> Iterator[None]:
    """Keep Lightning from telling of a training that the person did not ask for; its warnings stay."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
