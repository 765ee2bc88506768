"""Modules by their names before they had rooms, for one release: each says where what it held is now."""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

#: Where what a module held is now, by the module's old name.
MOVED: dict[str, tuple[str, ...]] = {
    "adapters": ("training.adapters",),
    "attention": ("functional.attention", "signals.attention"),
    "cache": ("teachers.cache.store", "teachers.cache", "teachers.cache.format", "models.fingerprints"),
    "cached_teacher": ("teachers.cache.teacher",),
    "checkpoint": ("training.checkpoint",),
    "class_names": ("models.class_names",),
    "ensemble": ("teachers.ensemble",),
    "exporting": ("models.exporting",),
    "fingerprints": ("models.fingerprints",),
    "folders": ("models.folders",),
    "following_activation": ("students.activations",),
    "initialization": ("students.initialization",),
    "inputs": ("models.inputs",),
    "layer_map": ("students.layer_map",),
    "learning_rates": ("optim.peak_lr",),
    "metrics": ("tasks.metrics",),
    "model_files": ("models.files",),
    "new_parameters": ("students.untouched",),
    "parallel": ("training.parallel",),
    "precision": ("teachers.precision",),
    "pretrained": ("models.pretrained",),
    "row_keys": ("teachers.cache.row_keys",),
    "scores": ("tasks.scores",),
    "stops": ("training.stops",),
    "student": ("students.from_teacher",),
    "teacher": ("teachers.module", "models.calling"),
    "teacher_module": ("teachers.module",),
    "vocabulary": ("signals.head",),
    "wrapped": ("models.wrapped",),
}


class _Moved(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        package, _, old = self.__name__.rpartition(".")
        for place in MOVED[old]:
            found = getattr(import_module(f"{package}.{place}"), name, None)
            if found is not None:
                warnings.warn(
                    f"`{self.__name__}.{name}` is in `{package}.{place}` now; the old place goes with the next "
                    "release.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return found
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def keep_old_names(package: str) -> None:
    """Let the old modules of a package be imported.

    Args:
        package: Its name.
    """
    for old in MOVED:
        sys.modules.setdefault(f"{package}.{old}", _Moved(f"{package}.{old}", "It has moved; see CONTRIBUTING.md."))
