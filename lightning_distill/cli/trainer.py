"""The arguments that flags describe: of a Trainer, of an optimizer and a schedule, of callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO

from lightning_distill.callbacks import (
    FiniteLoss,
    GradientClipping,
    InitPolicy,
    LRFinder,
    Resumable,
    ScheduleFree,
    TeacherCache,
)
from lightning_distill.cli.evidence import CountTested
from lightning_distill.cli.parser import SWITCHES, Flags
from lightning_distill.cli.report import CurvesLogger
from lightning_distill.cli.run_folder import best_weights
from lightning_distill.cli.screen import epochs_of
from lightning_distill.cli.task import metrics_of
from lightning_distill.module import DistillationModule
from lightning_distill.objectives import HardLabel, Objective
from lightning_distill.optim import build_lr_scheduler, build_optimizer
from lightning_distill.tasks.named_metrics import lower_is_better
from lightning_distill.training.checkpoint import AtomicCheckpointIO

_SCHEDULE_FREE = "schedule_free_adamw"


def build_callbacks(flags: Flags, phase: str, *, with_teacher: bool = True) -> list[Callback]:
    """Make the callbacks of a training that the flags ask for; they write to ``<output_dir>/logs/<phase>``.

    Args:
        flags: The parsed flags.
        phase: Name of the training.
        with_teacher: Whether it has a teacher; without, ``--init_policy from_teacher`` is left out.

    Raises:
        ValueError: If an argument of a callback is outside its range.

    Example:
        >>> from lightning_distill.cli import build_callbacks, text_parser
        >>> flags = ["--gradient_clipping.algorithm", "zscore", "--init_policy", "auto"]
        >>> asked = build_callbacks(text_parser(None, output_dir="runs").parse_args(flags), "student")
        >>> [type(callback).__name__ for callback in asked]
        ['InitPolicy', 'GradientClipping']
    """
    folder = flags.output_dir / "logs" / phase
    asked = {name: flags[name].as_dict() for name, switch in SWITCHES.items() if flags[switch] is not None}
    callbacks: list[Callback] = []
    if "init_policy" in asked and (with_teacher or flags.init_policy.policy != "from_teacher"):
        callbacks.append(InitPolicy(**asked["init_policy"], output_dir=folder))
    if "lr_finder" in asked:
        if asked["lr_finder"]["recommended_range"] is None:
            asked["lr_finder"]["recommended_range"] = flags.recommended
        callbacks.append(LRFinder(**asked["lr_finder"], output_dir=folder))
    elif flags.recommended is not None:
        flags.recommended.warn_if_far(flags.optimizer.lr)
    if "gradient_clipping" in asked:
        callbacks.append(GradientClipping(**asked["gradient_clipping"]))
    if "teacher_cache" in asked and with_teacher:
        path = asked["teacher_cache"]["path"]
        if flags.output_dir.resolve().is_relative_to(Path(path).resolve()):
            raise ValueError(
                f"Expected argument `teacher_cache.path` to be a folder of its own, but got {path!r}, which is or "
                f"holds `output_dir`, {str(flags.output_dir)!r}. Name another, such as {str(Path(path) / 'cache')!r}."
            )
        callbacks.append(TeacherCache(**asked["teacher_cache"]))
    if flags.optimizer.name == _SCHEDULE_FREE:
        callbacks.append(ScheduleFree())
    return callbacks


def trainer_arguments(
    flags: Flags,
    phase: str | None = None,
    *,
    callbacks: Sequence[Callback] | None = None,
    monitor: str = "val_loss",
) -> dict[str, Any]:
    """What ``--trainer.*`` say, for ``L.Trainer``, and what makes a run safe.

    Every training has a Trainer of its own: loggers and callbacks from the command line are made anew, and its metrics
    go to ``<output_dir>/logs/<phase>/metrics.csv`` beside whatever logger was asked for. The best, the last and the
    newest checkpoint (every ``--save_every_n_steps``) go to ``<output_dir>/checkpoints/<phase>``, by
    :class:`AtomicCheckpointIO` unless a CheckpointIO is among ``--trainer.plugins``. The run is :class:`Resumable`.

    Args:
        flags: The parsed flags.
        phase: Name of the training, which lasts as :func:`epochs_of` says; None for a Trainer that only tests or
            validates, and writes neither.
        callbacks: Callbacks of the training, before those of ``--trainer.callbacks``; None: those that other flags ask
            for, see :func:`build_callbacks`.
        monitor: The metric that says which epoch is best; with validation switched off, the last is.

    Example:
        >>> import lightning as L
        >>> from lightning_distill.cli import text_parser, trainer_arguments
        >>> flags = text_parser(None, output_dir="runs").parse_args(["--trainer.max_steps=5"])
        >>> L.Trainer(**trainer_arguments(flags, "student")).max_steps
        5
    """
    arguments: dict[str, Any] = dict(flags.parser.instantiate(flags).trainer.as_dict())
    asked, plugins, loggers = (_listed(arguments[name]) for name in ("callbacks", "plugins", "logger"))
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    if callbacks is None:
        callbacks = [] if phase is None else build_callbacks(flags, phase, with_teacher=phase != "teacher")
    hint = "the same command with --resume"
    callbacks = [*callbacks, *asked, FiniteLoss(**flags.finite_loss.as_dict()), Resumable(flags.seed, resume_hint=hint)]
    if phase is None:
        loggers = []  # in forked processes a second CSVLogger of one folder would begin its file anew
        callbacks.append(CountTested())
    else:
        loggers = [CurvesLogger(flags.output_dir / "logs", phase, keep=flags.resume), *loggers]
        folder, every = flags.output_dir / "checkpoints" / phase, flags.save_every_n_steps
        validates = flags.trainer.limit_val_batches != 0
        best = ModelCheckpoint(
            folder,
            filename="best",
            monitor=monitor if validates else None,
            mode="min" if lower_is_better(monitor.removeprefix("val_")) else "max",
            save_last=True,
            enable_version_counter=False,
        )
        newest = ModelCheckpoint(
            folder, "newest", every_n_train_steps=every, enable_version_counter=False, save_top_k=1
        )
        callbacks = [best, *callbacks, newest]
    return arguments | {
        "default_root_dir": flags.output_dir,
        "logger": loggers or False,
        "callbacks": callbacks,
        "plugins": plugins,
        "max_epochs": epochs_of(flags, phase),
    }


def _listed(asked: Any) -> list[Any]:
    """What a flag that takes one or several things holds."""
    if asked is None or isinstance(asked, bool):
        return []
    return list(asked) if isinstance(asked, list) else [asked]


def module_arguments(flags: Flags, data: Any, trainer: L.Trainer, *, with_teacher: bool = True) -> dict[str, Any]:
    """What a :class:`DistillationModule` takes beside models and objectives, as the flags ask.

    Optimizer and schedule are made when the training begins: the names of the parameters and the length of the schedule
    are the module's and the Trainer's.

    Args:
        flags: The parsed flags.
        data: The data module, whose tokenizer is saved beside the student.
        trainer: The Trainer that will train the module.
        with_teacher: Whether it has a teacher; without, what saves memory of a distillation is left out.
    """

    def optimizer(_: Any) -> Any:
        return build_optimizer(trainer.lightning_module, **flags.optimizer.as_dict())

    def schedule(optimizer: Any) -> Any:
        if flags.optimizer.name == _SCHEDULE_FREE:
            return None
        return build_lr_scheduler(trainer.lightning_module, optimizer, **flags.lr_scheduler.as_dict())

    saves_memory = ("teacher_precision", "gradient_checkpointing") if with_teacher else ()
    return {
        "optimizer": optimizer,
        "lr_scheduler": schedule,
        "tokenizer": getattr(data, "processor", None) or data.tokenizer,  # pictures have an image processor
        "metrics": metrics_of(flags, data),
        **{name: flags.model[name] for name in saves_memory},
    }


def objectives_of(flags: Flags, data: Any, default: list[Objective]) -> list[Objective]:
    """What ``--objectives`` asks for, or the default; hard labels weigh classes as ``--data.class_weights`` asks.

    Raises:
        ValueError: If classes are to be weighed, and none of ``--objectives`` learns from labels.
    """
    asked: list[Objective] = flags.parser.instantiate(flags).objectives or default
    weights: dict[str, list[float]] = getattr(data, "label_weights", {})
    hard = [objective for objective in asked if isinstance(objective, HardLabel)]
    if weights and asked is not default and not hard:
        raise ValueError("--data.class_weights needs the objective HardLabel, which learns from labels")
    for objective in hard:
        for name, values in weights.items():
            if getattr(objective, name) is None:
                setattr(objective, name, values)
    return asked


def load_best(module: DistillationModule, trainer: L.Trainer) -> None:
    """Go back to the best epoch of a training; where its checkpoint is damaged or gone, to the newest good one.

    A finished training that is resumed has nothing left to train, and its best epoch is taken all the same.
    """
    checkpoint: Any = trainer.checkpoint_callback
    best = best_weights(Path(checkpoint.dirpath), checkpoint.best_model_path)
    if best is not None:
        module.load_state_dict(best)
