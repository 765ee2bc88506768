"""Run a recipe in this process, and read what it wrote."""

import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

#: What a recipe does without files, in seconds: two short batches of each kind, of few rows.
TRIAL = [
    *(f"--trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test")),
    *("--model.teacher_epochs=1", "--trainer.max_epochs=1", "--data.batch_size=8"),
    *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
]

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

# A recipe says what is expected by name; these are about data of a few rows.
OF_A_FEW_ROWS = [
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The learning rate 0.01 is more than ten times outside the recommended range"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def load_recipe(name: str) -> Callable[[list[str]], None]:
    """The ``main`` of a recipe."""
    main: Callable[[list[str]], None] = runpy.run_path(str(RECIPES / f"{name}.py"))["main"]
    return main


def summary(tmp_path: Path) -> dict[str, Any]:
    """The ``summary.json`` of a run into ``tmp_path / "out"``."""
    found: dict[str, Any] = json.loads((tmp_path / "out" / "summary.json").read_text())
    return found


def refusal(main: Callable[[list[str]], None], flags: list[str], capsys: Any) -> str:
    """The one line that a run says of flags it refuses, with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    error: str = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


class Break(L.Callback):
    """Sends a signal to its process after the second step of a phase, as the variable BREAK says: ``student:15``."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        phase, _, number = os.environ.get("BREAK", "").partition(":")
        saves: Any = trainer.checkpoint_callback
        if phase and trainer.global_step == 2 and Path(saves.dirpath).name == phase:
            os.kill(os.getpid(), int(number))
