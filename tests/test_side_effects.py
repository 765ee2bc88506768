"""Importing the library, making its objects and training with them changes nothing that others share."""

import ast
import importlib
import logging
import multiprocessing
import os
import pkgutil
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import WeightAveraging
from tqdm import tqdm

import lightning_distill
from lightning_distill import DistillationModule
from tests.callbacks.registry import ROWS, Distillation, Regression, Row, same, trainer
from tests.objectives.registry import CASES

PACKAGE = Path(lightning_distill.__file__).parent


def global_state() -> dict[str, Any]:
    """What a program shares with the libraries it uses, but for the random generators."""
    loggers = {name: logger for name, logger in logging.root.manager.loggerDict.items() if hasattr(logger, "level")}
    return {
        "warnings": [str(entry) for entry in warnings.filters],
        "functions": (warnings.showwarning, sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook),
        "loggers": {
            name: [logger.level, logger.propagate, logger.disabled, list(logger.handlers), list(logger.filters)]
            for name, logger in {"root": logging.root, **loggers}.items()
            if logger.level or logger.handlers or logger.filters or not logger.propagate or logger.disabled
        },
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "import": (list(sys.meta_path), list(sys.path), list(sys.path_hooks)),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "processes": multiprocessing.get_start_method(allow_none=True),
        "numpy": (np.geterr(), np.get_printoptions()),
        "transformers": (
            transformers.utils.logging.get_verbosity(),
            transformers.utils.logging.is_progress_bar_enabled(),
        ),
        "torch": {
            "dtype": torch.get_default_dtype(),
            "device": torch.get_default_device(),
            "threads": torch.get_num_threads(),
            "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
            "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
            "precision": torch.get_float32_matmul_precision(),
            "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
            "benchmark": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
            "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
            "safe to load": len(torch.serialization.get_safe_globals()),
            "validate": torch.distributions.Distribution._validate_args,
        },
    }


def random_state() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), [str(part) for part in np.random.get_state()]]  # noqa: NPY002


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def reimport(file: Path) -> None:
    """Run the code of every module of the library again, while all that it imports from others is there already."""
    names = [info.name for info in pkgutil.walk_packages(lightning_distill.__path__, "lightning_distill.")]
    names = ["lightning_distill", *(name for name in names if not name.endswith("__main__"))]
    for name in names:
        importlib.import_module(name)
    for name in names:
        del sys.modules[name]
    before, numbers = global_state(), random_state()
    for name in names:
        importlib.import_module(name)
    found = changes(before, global_state())
    if not same(numbers, random_state()):
        found["random numbers"] = "drawn"
    file.write_text(f"{len(names)} {found}")


@pytest.mark.forks
def test_importing_changes_nothing(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=reimport, args=(tmp_path / "found",))
    child.start()
    child.join()
    count, _, found = (tmp_path / "found").read_text().partition(" ")
    assert int(count) > 150
    assert found == "{}"


def test_making_things_changes_nothing(tmp_path: Path) -> None:
    before, numbers = global_state(), random_state()
    for row in ROWS:
        row.build(tmp_path)
    for case in CASES:
        case.make()
    DistillationModule(Distillation().teacher, Distillation().student, task="regression", teacher_precision="bf16")
    assert changes(before, global_state()) == {}
    assert same(numbers, random_state())


def state_before_a_run(folder: Path) -> dict[str, Any]:
    """The state behind what the first run of Lightning and the first bar of tqdm leave."""
    tqdm.get_lock()
    trainer(folder / "of Lightning alone", max_steps=1).fit(Regression())
    return global_state()


@pytest.mark.filterwarnings("ignore:Expected at least as many calibration tokens")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_run_with_a_callback_leaves_everything_as_it_was(row: Row, tmp_path: Path) -> None:
    before = state_before_a_run(tmp_path)
    trainer(tmp_path / "run", row.build(tmp_path)).fit(row.module())
    assert changes(before, global_state()) == {}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_distillation_leaves_everything_as_it_was(precision: Any, tmp_path: Path) -> None:
    before = state_before_a_run(tmp_path)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "precision": precision, "enable_progress_bar": True}
    trainer(tmp_path / "run", WeightAveraging(), **options).fit(Distillation())
    assert changes(before, global_state()) == {}


# -- the same, by reading the code: also for what no test here runs --------------------------------------------------

SETTERS = {
    "filterwarnings", "simplefilter", "captureWarnings", "addFilter", "addHandler", "setLevel", "basicConfig",
    "set_default_dtype", "set_default_device", "set_num_threads", "set_float32_matmul_precision",
    "use_deterministic_algorithms", "set_printoptions", "add_safe_globals", "set_start_method", "putenv", "chdir",
    "disable_progress_bar", "set_verbosity", "set_verbosity_error",
}  # fmt: skip

# Those that put back what was before when their block ends.
CONTEXTS = {
    ("cli/dry_run.py", "setLevel"),
    ("cli/screen.py", "addFilter"),
    ("cli/screen.py", "disable_progress_bar"),
    ("models/files.py", "addFilter"),
    ("teachers/precision.py", "set_default_dtype"),
}


def global_calls(tree: ast.AST) -> Iterator[str]:
    """Names of functions that set something global, but inside of ``with warnings.catch_warnings()``."""
    if isinstance(tree, ast.With) and any("catch_warnings" in ast.unparse(item) for item in tree.items):
        return
    if isinstance(tree, ast.Call):
        path, _, name = ast.unparse(tree.func).rpartition(".")
        if name in SETTERS:
            yield name
        if path == "os.environ" and name in ("setdefault", "update", "pop", "clear"):
            yield "environ"
    if isinstance(tree, ast.Assign | ast.AugAssign | ast.Delete):
        targets = [tree.target] if isinstance(tree, ast.AugAssign) else tree.targets
        yield from ("environ" for target in targets if ast.unparse(target).startswith("os.environ"))
    for child in ast.iter_child_nodes(tree):
        yield from global_calls(child)


FILES = sorted(
    {str(file.relative_to(PACKAGE)) for folder in (PACKAGE, PACKAGE / "callbacks") for file in folder.rglob("*.py")}
)


@pytest.mark.parametrize("file", FILES)
def test_no_code_sets_what_others_share(file: str) -> None:
    calls = {(file, name) for name in global_calls(ast.parse((PACKAGE / file).read_text()))}
    assert calls - CONTEXTS == set()
