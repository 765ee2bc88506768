"""What a command says: on rank 0 alone, errors in one line, and without what libraries say to everybody."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import transformers
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

from lightning_distill.cli.parser import Flags
from lightning_distill.measure import count_parameters

say = rank_zero_only(print)

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
_INPUT_ERRORS = (
    *(ValueError, TypeError, ImportError, OSError, MisconfigurationException, SafetensorError),
    *(RuntimeError, LookupError, ArithmeticError, AttributeError, MemoryError),
)


def epochs_of(flags: Flags, phase: str | None) -> int:
    """How long a training is: ``--model.<phase>_epochs`` where there is such a flag, else ``--trainer.max_epochs``."""
    flag = "ramp" if (phase or "").startswith("early_exit") else phase
    epochs: int = flags.model.get(f"{flag}_epochs", flags.trainer.max_epochs)
    return epochs


def begin_training(flags: Flags, phase: str, model: Any) -> None:
    """Say what is trained, and seed everything: no training depends on what came before it."""
    flags.trainings.append(phase)
    what = {"teacher": "the teacher first"}.get(phase, phase.replace("_", " "))
    config: Any = getattr(model, "config", None)
    size = f"{count_parameters(model) / 1e6:.2f} M parameters"
    if hasattr(config, "num_hidden_layers") and hasattr(config, "hidden_size"):
        size = f"{config.num_hidden_layers} layers, width {config.hidden_size}, {size}"
    say(f"\nTraining {what}, for {epochs_of(flags, phase)} epochs: {size}")
    L.seed_everything(flags.seed, workers=True, verbose=False)


def shows_progress(flags: Flags) -> bool:
    """Whether what takes long shows a bar, as training does."""
    return flags.trainer.enable_progress_bar is not False


@contextmanager
def one_line_errors(program: str | None = None) -> Iterator[None]:
    """Turn what is wrong with what the user gave into one line on stderr and exit code 2.

    Whatever its cause: what a library says of a file or a flag that it cannot use may be an error of any kind. So it
    stands around what is done before the training, and not around the training.

    Args:
        program: Whose error it is; None: the script that runs.
    """
    try:
        yield
    except _INPUT_ERRORS as error:
        said = " ".join(str(error).split())
        if not said or not isinstance(error, (ValueError, TypeError, ImportError, OSError, MisconfigurationException)):
            said = f"{type(error).__name__}: {said}" if said else type(error).__name__
        print(f"{program or Path(sys.argv[0]).name}: error: {said}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence meanwhile, by name, what libraries say to everybody, so that what a command says is seen."""
    loggers = [
        logging.getLogger(f"{name}")
        for name in ("lightning.pytorch.utilities.rank_zero", "transformers.generation.utils")
    ]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.addFilter(_is_news)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_news)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_EXPECTED_MESSAGES)
