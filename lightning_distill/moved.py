"""Modules by their names before they had rooms, for one release: each says where what it held is now."""

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Where what a module held is now, by the module's old name.
MOVED: dict[str, tuple[str, ...]] = {
    "accumulation": ("step.accumulation",),
    "adapters": ("training.adapters",),
    "attention": ("functional.attention", "signals.attention"),
    "cache": ("teachers.cache", "teachers.cache.store", "teachers.cache.format", "models.fingerprints"),
    "cache_description": ("teachers.cache.format",),
    "cached_teacher": ("teachers.cache.teacher",),
    "callbacks.finite_loss": ("training.finite_loss",),
    "checkpoint": ("training.checkpoint",),
    "class_names": ("models.class_names",),
    "counting": ("step.counting",),
    "ensemble": ("teachers.ensemble",),
    "exporting": ("models.exporting",),
    "fingerprints": ("models.fingerprints",),
    "folders": ("models.folders",),
    "following_activation": ("students.activations",),
    "forwards": ("step.forwards", "step.counting"),
    "functional.lr_suggestion": ("functional.range_test",),
    "functional.vocabulary": ("functional.linear", "functional.chunked"),
    "initialization": ("students.initialization", "functional.tensors"),
    "inputs": ("models.inputs",),
    "layer_map": ("students.layer_map",),
    "learning_rates": ("optim.peak_lr",),
    "metrics": ("tasks.metrics",),
    "model_files": ("models.files",),
    "new_parameters": ("students.untouched",),
    "objectives.logits_cosine": ("objectives.logits",),
    "parallel": ("training.parallel",),
    "parsing": ("cli.parser",),
    "precision": ("teachers.precision",),
    "preflight": ("step.checks", "step.checked_run", "step.pairing", "models.tokenizers", "models.class_names"),
    "pretrained": ("models.pretrained", "models.exporting"),
    "report": ("cli.report",),
    "row_keys": ("teachers.cache.row_keys",),
    "run_folder": ("cli.run_folder", "cli.screen"),
    "scores": ("tasks.scores",),
    "smaller_config": ("students.config",),
    "stops": ("training.stops",),
    "student": ("students.from_teacher",),
    "teacher": ("teachers.module", "models.calling"),
    "teacher_module": ("teachers.module",),
    "vocabulary": ("signals.head",),
    "wrapped": ("models.wrapped",),
}
#: What rooms held when they were modules of their name, and other rooms do now.
_LENT = {"tasks": ("models.batch", "models.calling", "models.heads", "tasks.task"), "signals": ("signals.description",)}
_PACKAGE = __name__.rpartition(".")[0]


class _Moved(ModuleType):
    """Looks for its names where they are now, and says so."""

    def __getattr__(self, name: str) -> Any:
        places = MOVED[self.__name__.removeprefix(f"{_PACKAGE}.")]
        if name == "__all__":
            modules = [import_module(f"{_PACKAGE}.{place}") for place in places]
            return sorted({each for module in modules for each in vars(module) if not each.startswith("_")})
        return find(self.__name__, name, places)


def find(old: str, name: str, places: tuple[str, ...]) -> Any:
    """A name of a module at its new place, with a warning that says which.

    Raises:
        AttributeError: If it is nowhere.
    """
    for place in places if not name.startswith("__") else ():
        found = getattr(import_module(f"{_PACKAGE}.{place}"), name, None)
        if found is not None:
            warnings.warn(
                f"`{old}.{name}` is in `{_PACKAGE}.{place}` now; the old place goes with the next release.",
                DeprecationWarning,
                stacklevel=3,
            )
            return found
    raise AttributeError(f"module {old!r} has no attribute {name!r}")


def keep_old_names() -> None:
    """Let the old modules of the package be imported, and its rooms be asked for what they lent."""
    for old in MOVED:
        name = f"{_PACKAGE}.{old}"
        module = _Moved(name, "It has moved; see CONTRIBUTING.md.")
        module.__spec__ = ModuleSpec(name, None)
        sys.modules.setdefault(name, module)
        parent, _, short = name.rpartition(".")
        if parent in sys.modules and not hasattr(sys.modules[parent], short):
            setattr(sys.modules[parent], short, module)
    for room, places in _LENT.items():
        name = f"{_PACKAGE}.{room}"
        vars(sys.modules[name]).setdefault(
            "__getattr__", lambda asked, name=name, places=places: find(name, asked, places)
        )
