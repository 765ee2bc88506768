"""One step of a training before anything is written, which finds what is wrong with Trainer, data and models."""

import copy
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_distill.callbacks import LRFinder, TeacherCache
from lightning_distill.cli.flags import trains_teacher
from lightning_distill.cli.models import in_own_precision
from lightning_distill.cli.parser import Flags
from lightning_distill.cli.trainer import build_callbacks, module_arguments, trainer_arguments
from lightning_distill.module import DistillationModule
from lightning_distill.objectives import Objective


def dry_run(
    flags: Flags,
    data: Any,
    teacher: Any,
    student: nn.Module,
    *stages: list[Objective],
    make: Callable[..., DistillationModule] = DistillationModule,
) -> None:
    """Train one step and validate one batch of each training that is to come, on copies.

    All is written to a folder that goes away.

    Args:
        flags: The parsed flags.
        data: The data.
        teacher: The teacher; it stays as it is.
        student: The student; it stays as it is.
        *stages: What it learns from; they stay as they are.
        make: What makes the module of a student.

    Raises:
        ValueError: If the Trainer shards models or starts more processes than a machine can bear, or a limit leaves
            less than a batch; and whatever else the Trainer, the module and its callbacks refuse up to the first step.
    """
    _check_limits(flags, data)
    imitated = in_own_precision(flags, teacher)
    for objectives in stages:
        _step(flags, data, make, imitated, student, objectives, flags.trainer.max_epochs)
    if trains_teacher(flags):
        _step(flags, data, DistillationModule, None, teacher, None, flags.model.teacher_epochs)


def _step(
    flags: Flags,
    data: Any,
    make: Callable[..., DistillationModule],
    teacher: nn.Module | None,
    student: nn.Module,
    objectives: list[Objective] | None,
    max_epochs: int,
) -> None:
    with_teacher = teacher is not None
    flags = Flags.of(flags.clone(), flags.parser)  # recommends nothing: the training itself says what is far from it
    asked = build_callbacks(flags, "student", with_teacher=with_teacher)
    caches = [one for one in asked if isinstance(one, TeacherCache)]
    with tempfile.TemporaryDirectory() as folder, _unannounced():
        flags.output_dir, flags.resume, flags.trainer.logger = Path(folder), False, False
        # They write, or train, where the training will.
        asked = build_callbacks(flags, "dry_run", with_teacher=with_teacher)
        callbacks = [one for one in asked if not isinstance(one, LRFinder | TeacherCache)]
        arguments = trainer_arguments(flags, "dry_run", callbacks=[*callbacks, _OneStep()])
        for callback in arguments["callbacks"]:
            if isinstance(callback, ModelCheckpoint):
                callback.save_last = False  # one is enough to see that it can be written
        arguments |= {
            "max_epochs": max_epochs,
            "min_epochs": None,
            "min_steps": None,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0 if flags.trainer.limit_val_batches == 0 else 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "profiler": None,
        }
        trainer = L.Trainer(**arguments)
        _check_trainer(trainer)
        if getattr(trainer.strategy.launcher, "is_interactive_compatible", False):
            # An error in a process that this one forks arrives here as a traceback.
            trainer = L.Trainer(**arguments | {"strategy": "auto", "devices": 1, "num_nodes": 1})
        options = module_arguments(flags, data, trainer, with_teacher=with_teacher)
        module = make(teacher, _copy(student), copy.deepcopy(objectives), **options)
        for cache in caches:  # does it hold what is asked for?
            cache.attach(module)
            cache.detach()
        trainer.fit(module, datamodule=data)


class _OneStep(L.Callback):
    """Ends the training after its first batch; no checkpoint is written meanwhile but to the folder that goes away."""

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        own = Path(trainer.default_root_dir)
        for callback in list(trainer.callbacks):
            elsewhere = not Path(getattr(callback, "dirpath", None) or own).is_relative_to(own)
            if isinstance(callback, Checkpoint) and elsewhere:
                trainer.callbacks.remove(callback)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = True


def _copy(model: nn.Module) -> nn.Module:
    """A copy of whose parameters the same count as new: see :mod:`lightning_distill.students.untouched`."""
    copied = copy.deepcopy(model)
    for given, parameter in zip(model.parameters(), copied.parameters(), strict=True):
        vars(parameter).update(vars(given))
        if given._version:
            with torch.no_grad():
                parameter.mul_(1)
    return copied


def _check_limits(flags: Flags, data: Any) -> None:
    for split in ("train", "val", "test"):
        limit = flags.trainer[f"limit_{split}_batches"]
        loader = getattr(data, f"{split}_dataloader")
        if isinstance(limit, float) and 0 < limit < 1 and int(limit * (batches := len(loader()))) == 0:
            raise ValueError(f"--trainer.limit_{split}_batches {limit} of {batches} batches is less than one; raise it")


def _check_trainer(trainer: L.Trainer) -> None:
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError("--trainer.strategy: a recipe writes whole models; shard in a script of your own")
    cores = os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > max(8, 2 * cores):
        raise ValueError(f"--trainer.devices asks for {trainer.num_devices} processes on a CPU of {cores} cores")


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
