"""Run a recipe in this process, and read what it wrote."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

# A recipe says what is expected by name; these are about data of a few rows.
OF_A_FEW_ROWS = [
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
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
