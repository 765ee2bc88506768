"""What every recipe's command line has in common: the flags, the trainer they describe, errors in one line."""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import transformers
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError
from torch.optim import Optimizer

from lightning_distill.callbacks import (
    FiniteLoss,
    GradientClipping,
    InitPolicy,
    LRFinder,
    Resumable,
    ScheduleFree,
    TeacherCache,
)
from lightning_distill.cli.parser import SWITCHES, FlagParser
from lightning_distill.cli.report import CurvesLogger
from lightning_distill.cli.run_folder import begin_run, end_run, resume_from, run_command, say
from lightning_distill.data import TextClassificationData
from lightning_distill.optim import LRRange, build_lr_scheduler, build_optimizer
from lightning_distill.training.checkpoint import AtomicCheckpointIO

__all__ = [
    "begin_run",
    "best_checkpoint",
    "build_callbacks",
    "end_run",
    "make_trainer",
    "one_line_errors",
    "optimizer_from_flags",
    "quiet",
    "recipe_parser",
    "resume_from",
    "run_command",
    "say",
    "schedule_from_flags",
]

# One entry a message: what libraries say to everybody and a recipe has already decided; the last one transformers'
# assisted generation says of its own call.
_EXPECTED_MESSAGES = (
    "GPU available: False",
    "TPU available: False",
    "\U0001f4a1 Tip:",
    "Loading `train_dataloader` to estimate number of stepping batches",
    "Restoring states from the checkpoint path",
    "Loaded model weights from the checkpoint",
    "Passing `generation_config` together with generation-related arguments",
)
_EXPECTED_WARNINGS = (
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "The number of training batches .* is smaller than the logging interval",
    "The '.*_dataloader' does not have many workers",
    "Checkpoint directory .* exists and is not empty",
    "Experiment logs directory .* exists and is not empty",
    "The variance of predictions or target is close to zero",  # the report says what that means
)


def recipe_parser(
    description: str | None,
    *,
    output_dir: str,
    defaults: dict[str, Any],
    data: type[L.LightningDataModule] = TextClassificationData,
) -> ArgumentParser:
    """Make the parser of a recipe: ``--data.*``, ``--trainer.*``, ``--config`` and the rest.

    ``--optimizer lion``, ``--lr_scheduler cosine`` and ``--init_policy auto`` are short for ``--optimizer.name lion``
    and so on. ``--gradient_clipping.algorithm``, ``--lr_finder.suggestion``, ``--init_policy`` and
    ``--teacher_cache.path`` ask for the callback; without them it is left out. See :func:`build_callbacks`.

    Args:
        description: The recipe's docstring, shown by ``--help``.
        output_dir: Default of ``--output_dir``.
        defaults: Defaults that differ from those of the classes, by flag: ``{"trainer.max_epochs": 3}``.
        data: The class that ``--data.*`` describe; its tokenizer and seed are the recipe's.

    Returns:
        A parser to which the recipe adds flags of its own.
    """
    parser = _Parser(description=description)
    parser.add_argument("--config", action="config", help="a YAML file with any of these flags")
    parser.add_argument("--output_dir", type=Path, default=output_dir, help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output_dir that was cut")
    parser.add_argument("--save_every_n_steps", type=int, default=500, help="steps that a crash costs at most")
    parser.add_class_arguments(data, "data", instantiate=False, skip={"tokenizer", "seed"})
    parser.add_function_arguments(build_optimizer, "optimizer", skip={"module"})
    parser.add_function_arguments(build_lr_scheduler, "lr_scheduler", skip={"module", "optimizer"})
    parser.add_class_arguments(GradientClipping, "gradient_clipping", instantiate=False)
    parser.add_class_arguments(LRFinder, "lr_finder", instantiate=False, skip={"output_dir"})
    parser.add_class_arguments(InitPolicy, "init_policy", instantiate=False, skip={"output_dir", "teacher"})
    parser.add_class_arguments(FiniteLoss, "finite_loss", instantiate=False)
    parser.add_class_arguments(TeacherCache, "teacher_cache", instantiate=False, skip={"path"})
    parser.add_argument(
        "--teacher_cache.path", type=str | None, help="folder of what the teacher says (none: no cache)"
    )
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, skip={"default_root_dir"})
    parser.set_defaults({"optimizer.lr": None, "optimizer.weight_decay": 0.01, "lr_scheduler.warmup": 0.06})
    parser.set_defaults(dict.fromkeys(SWITCHES.values()))
    parser.set_defaults(defaults)
    return parser


_SCHEDULE_FREE = "schedule_free_adamw"


class _Parser(FlagParser):
    """Knows what gives way."""

    def parse_args(self, *args: Any, **options: Any) -> Namespace:  # type: ignore[override]
        config = super().parse_args(*args, **options)
        clips = config.get(SWITCHES["gradient_clipping"]) is not None
        if clips and config.trainer.gradient_clip_val is not None:
            if config.trainer.gradient_clip_val != self.get_default("trainer.gradient_clip_val"):
                self.error("--gradient_clipping.* and --trainer.gradient_clip_val would clip twice: leave one out")
            config.trainer.gradient_clip_val = None  # the recipe's own default gives way
        return config


def build_callbacks(
    config: Namespace, phase: str, *, recommended: LRRange | None = None, with_teacher: bool = True
) -> list[Callback]:
    """Make the callbacks of a phase that the flags ask for; they write to ``<output_dir>/logs/<phase>``.

    Args:
        config: The parsed flags.
        phase: Name of the phase.
        recommended: For the LR finder, where ``--lr_finder.recommended_range`` says nothing.
        with_teacher: Whether the phase has a teacher; without, ``--init_policy from_teacher`` is left out.

    Raises:
        ValueError: If an argument of a callback is outside its range.

    Example:
        >>> from lightning_distill.cli.trainer import build_callbacks, recipe_parser
        >>> parser = recipe_parser(None, output_dir="runs", defaults={})
        >>> flags = ["--gradient_clipping.algorithm", "zscore", "--init_policy", "auto"]
        >>> [type(callback).__name__ for callback in build_callbacks(parser.parse_args(flags), "student")]
        ['InitPolicy', 'GradientClipping']
    """
    folder = config.output_dir / "logs" / phase
    asked = {name: config[name].as_dict() for name, switch in SWITCHES.items() if config[switch] is not None}
    callbacks: list[Callback] = []
    if "init_policy" in asked and (with_teacher or config.init_policy.policy != "from_teacher"):
        callbacks.append(InitPolicy(**asked["init_policy"], output_dir=folder))
    if "lr_finder" in asked:
        if asked["lr_finder"]["recommended_range"] is None:
            asked["lr_finder"]["recommended_range"] = recommended
        callbacks.append(LRFinder(**asked["lr_finder"], output_dir=folder))
    if "gradient_clipping" in asked:
        callbacks.append(GradientClipping(**asked["gradient_clipping"]))
    if "teacher_cache" in asked and with_teacher:
        path = asked["teacher_cache"]["path"]
        if config.output_dir.resolve().is_relative_to(Path(path).resolve()):
            raise ValueError(
                f"Expected argument `teacher_cache.path` to be a folder of its own, but got {path!r}, which is or "
                f"holds `output_dir`, {str(config.output_dir)!r}. Name another, such as {str(Path(path) / 'cache')!r}."
            )
        callbacks.append(TeacherCache(**asked["teacher_cache"]))
    if config.optimizer.name == _SCHEDULE_FREE:
        callbacks.append(ScheduleFree())
    return callbacks


def optimizer_from_flags(config: Namespace, module: L.LightningModule, lr: float) -> Optimizer:
    """Make the optimizer that ``--optimizer.*`` ask for.

    Args:
        config: The parsed flags.
        module: The module whose trainable parameters it takes.
        lr: The learning rate where ``--optimizer.lr`` says nothing.
    """
    asked = config.optimizer.as_dict()
    return build_optimizer(module, **{**asked, "lr": lr if asked["lr"] is None else asked["lr"]})


def schedule_from_flags(
    config: Namespace, module: L.LightningModule, optimizer: Optimizer, **changes: Any
) -> dict[str, Any] | None:
    """Make the schedule that ``--lr_scheduler.*`` ask for; None for a schedule-free optimizer.

    Args:
        config: The parsed flags.
        module: The module whose Trainer tells the length of the schedule.
        optimizer: The optimizer.
        **changes: Arguments that go before the flags.
    """
    if config.optimizer.name == _SCHEDULE_FREE:
        return None
    return build_lr_scheduler(module, optimizer, **{**config.lr_scheduler.as_dict(), **changes})


def make_trainer(
    parser: ArgumentParser, config: Namespace, phase: str, *, callbacks: Sequence[Callback] = (), **overrides: Any
) -> L.Trainer:
    """Make a new Trainer from ``--trainer.*`` for one phase of a recipe.

    Every phase gets its own: loggers and callbacks from the command line are made anew, and its metrics go to
    ``<output_dir>/logs/<phase>/metrics.csv`` beside whatever logger was asked for. Checkpoints are written by
    :class:`AtomicCheckpointIO`, unless a CheckpointIO is among ``--trainer.plugins``; where there is a ModelCheckpoint,
    another one keeps the newest every ``--save_every_n_steps``. The run is :class:`Resumable`.

    Args:
        parser: The parser that made ``config``.
        config: The parsed flags.
        phase: Name of the phase.
        callbacks: Callbacks of the recipe, before those from the command line.
        **overrides: Arguments of the Trainer that this phase sets for itself.

    Returns:
        The trainer.
    """
    arguments = dict(parser.instantiate(config).trainer.as_dict())
    asked = arguments.pop("callbacks") or []
    loggers = arguments.pop("logger")
    loggers = (
        [] if isinstance(loggers, bool) or loggers is None else loggers if isinstance(loggers, list) else [loggers]
    )
    csv_logger = CurvesLogger(config.output_dir / "logs", phase, keep=config.resume)
    plugins = arguments.pop("plugins") or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins = [*plugins, AtomicCheckpointIO()]
    hint = "the same command with --resume"
    safe: list[Callback] = [FiniteLoss(**config.finite_loss.as_dict()), Resumable(config.seed, resume_hint=hint)]
    saves = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    if saves:
        every = config.save_every_n_steps
        newest = ModelCheckpoint(
            saves[0].dirpath, "newest", every_n_train_steps=every, enable_version_counter=False, save_top_k=1
        )
        safe.append(newest)
    arguments |= {
        "default_root_dir": config.output_dir,
        "logger": [csv_logger, *loggers],
        "callbacks": [*callbacks, *(asked if isinstance(asked, list) else [asked]), *safe],
        "plugins": plugins,
    }
    return L.Trainer(**(arguments | overrides))


def best_checkpoint(config: Namespace, phase: str, monitor: str) -> ModelCheckpoint:
    """Keep the best and the last checkpoint of a phase in ``<output_dir>/checkpoints/<phase>``.

    Args:
        config: The parsed flags.
        phase: Name of the phase.
        monitor: The metric that says which is best; with validation switched off, the last is.
    """
    validates = config.trainer.limit_val_batches != 0
    return ModelCheckpoint(
        config.output_dir / "checkpoints" / phase,
        filename="best",
        monitor=monitor if validates else None,
        mode="min" if monitor.endswith(("loss", "perplexity")) else "max",
        save_last=True,
        enable_version_counter=False,
    )


_INPUT_ERRORS = (
    *(ValueError, TypeError, ImportError, OSError, MisconfigurationException, SafetensorError),
    *(RuntimeError, LookupError, ArithmeticError, AttributeError, MemoryError),
)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn what is wrong with what the user gave into one line on stderr and exit code 2.

    Whatever its cause: what a library says of a file or a flag that it cannot use may be an error of any kind. So it
    stands around what is done before the training, and not around the training.

    Args:
        program: Whose error it is.
    """
    try:
        yield
    except _INPUT_ERRORS as error:
        said = " ".join(str(error).split())
        if not said or not isinstance(error, (ValueError, TypeError, ImportError, OSError, MisconfigurationException)):
            said = f"{type(error).__name__}: {said}" if said else type(error).__name__
        print(f"{program}: error: {said}", file=sys.stderr)
        raise SystemExit(2) from None


def quiet() -> None:
    """Silence, by name, what libraries say to everybody, so that what a recipe says is seen."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    for logger in ("lightning.pytorch.utilities.rank_zero", "transformers.generation.utils"):
        logging.getLogger(logger).addFilter(_is_news)
    transformers.utils.logging.disable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_EXPECTED_MESSAGES)
