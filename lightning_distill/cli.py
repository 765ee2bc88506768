"""What every recipe's command line has in common: the flags, the trainer they describe, errors in one line."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import transformers
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import Optimizer

from lightning_distill.data import TextClassificationData

# One entry a message: what Lightning says to everybody and a recipe has already decided.
_EXPECTED_MESSAGES = (
    "GPU available: False",
    "TPU available: False",
    "\U0001f4a1 Tip:",
    "Loading `train_dataloader` to estimate number of stepping batches",
    "Restoring states from the checkpoint path",
    "Loaded model weights from the checkpoint",
)
_EXPECTED_WARNINGS = (
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "The number of training batches .* is smaller than the logging interval",
    "The '.*_dataloader' does not have many workers",
    "Checkpoint directory .* exists and is not empty",
    "Experiment logs directory .* exists and is not empty",
)


def recipe_parser(description: str | None, *, output_dir: str, defaults: dict[str, Any]) -> ArgumentParser:
    """Make the parser of a recipe: ``--data.*``, ``--optimizer.*``, ``--trainer.*``, ``--config`` and the rest.

    Args:
        description: The recipe's docstring, shown by ``--help``.
        output_dir: Default of ``--output_dir``.
        defaults: Defaults that differ from those of the classes, by flag: ``{"trainer.max_epochs": 3}``.

    Returns:
        A parser to which the recipe adds flags of its own.
    """
    parser = ArgumentParser(description=description, formatter_class=_formatter())
    parser.add_argument("--config", action="config", help="a YAML file with any of these flags")
    parser.add_argument("--output_dir", type=Path, default=output_dir, help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_class_arguments(TextClassificationData, "data", instantiate=False, skip={"tokenizer", "seed"})
    parser.add_argument("--optimizer.lr", type=float, help="highest learning rate of AdamW")
    parser.add_argument("--optimizer.weight_decay", type=float, default=0.01, help="decoupled weight decay")
    parser.add_argument("--optimizer.warmup", type=float, default=0.06, help="share of the steps that warm up")
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, skip={"default_root_dir"})
    parser.set_defaults(defaults)
    return parser


def _formatter() -> Any:
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """Keeps the line breaks of the docstring, where the commands stand."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return "".join(indent + line for line in text.splitlines(keepends=True))

    return Formatter


def make_trainer(
    parser: ArgumentParser, config: Namespace, phase: str, *, callbacks: Sequence[Callback] = (), **overrides: Any
) -> L.Trainer:
    """Make a new Trainer from ``--trainer.*`` for one phase of a recipe.

    Every phase gets its own: loggers and callbacks from the command line are made anew, and its metrics go to
    ``<output_dir>/logs/<phase>/metrics.csv`` beside whatever logger was asked for.

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
    csv_logger = CSVLogger(config.output_dir / "logs", name=phase, version="")
    arguments |= {
        "default_root_dir": config.output_dir,
        "logger": [csv_logger, *loggers],
        "callbacks": [*callbacks, *(asked if isinstance(asked, list) else [asked])],
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


def linear_warmup(trainer: L.Trainer, warmup: float) -> Callable[[Optimizer], dict[str, Any]]:
    """Learning rate that rises over a share of all steps and then falls to zero in a line, stepped every step.

    Args:
        trainer: Knows the number of steps, once it fits.
        warmup: Share of the steps, in [0, 1].
    """

    def schedule(optimizer: Optimizer) -> dict[str, Any]:
        steps = int(trainer.estimated_stepping_batches)
        scheduler = transformers.get_linear_schedule_with_warmup(optimizer, int(warmup * steps), steps)
        return {"scheduler": scheduler, "interval": "step"}

    return schedule


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn what is wrong with the user's input into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, ModuleNotFoundError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def quiet() -> None:
    """Silence, by name, what libraries say to everybody, so that what a recipe says is seen."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    transformers.utils.logging.disable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_EXPECTED_MESSAGES)
