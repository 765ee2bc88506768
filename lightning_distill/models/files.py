"""The files of a model, looked at before anything is allocated: they may be damaged, or made to do harm."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: What transformers, torch and safetensors say of a folder that is wrong: they check little, and each in its own way.
BROKEN = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError, SafetensorError, StrictDataclassError),
)
# Names in a config of how much there is of something, and of how many layers; neither can be more than the files hold.
_SIZE = re.compile(
    r"num_|size|dim|width|channels|experts|labels|^n_(embd|inner|head|layer)|^d_(model|ff|kv)|ffn|layers|depths"
)
_NO_SIZE = re.compile(
    r"position|chunk|window|context|beam|return|token|bucket|image|patch|group_size|_id$|dropout|mask"
)
_LAYERS = re.compile(r"(^|_)layers?$|^depths$|experts$")
#: Elements of a model that its files need not hold: a new head, tables that are computed, one tied weight.
_SLACK = 2**26


def read_json(file: Path) -> dict[str, Any]:
    """The dictionary in a file.

    Raises:
        ValueError: If there is none; the message names the file.
    """
    try:
        if not file.is_file():
            raise FileNotFoundError("there is no such file")
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        said = f"Expected {file.parent} to hold a readable {file.name}, but got: {one_line(error)}"
        raise ValueError(said) from error
    if not isinstance(found, dict):
        raise ValueError(f"Expected {file} to hold a dictionary, but got a {type(found).__name__}.")
    return found


def one_line(error: BaseException) -> str:
    """What an error says, in one line of not too many words, with its name where that is needed to understand it."""
    said = " ".join(str(error).split())
    if not said or not isinstance(error, (OSError, RuntimeError, SafetensorError, ValueError)):
        said = f"{type(error).__name__}: {said}".rstrip(": ")
    return said if len(said) <= 300 else f"{said[:300]} ..."


@dataclass(frozen=True)
class Tensors:
    """What the headers of safetensors files say is in them.

    Args:
        shapes: The shape of each tensor, by name.
        dtypes: The type of each, as safetensors call it.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """How many numbers there are."""
        return sum(map(prod, self.shapes.values()))

    def add(self, file: Path) -> None:
        """Read the header of one more file.

        Raises:
            ValueError: If it is no safetensors file, or not whole.
        """
        try:
            if not file.is_file():
                raise FileNotFoundError("there is no such file")
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"Expected {file} to be a whole safetensors file, but got: {one_line(error)}. Write or copy it again."
            ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights of a model, in its own folder.

    Args:
        folder: The folder.

    Raises:
        ValueError: If there are none, or its index names a file that is elsewhere or is no safetensors file.
    """
    index = folder / INDEX
    if os.path.lexists(folder / WEIGHTS):
        return [folder / WEIGHTS]
    if not os.path.lexists(index):
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        advice = (
            f" {pickled[0]} is a pickle, which can run code; save the model with save_pretrained." if pickled else ""
        )
        raise ValueError(f"Expected {folder} to hold {WEIGHTS}, but it is not there.{advice}")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"Expected {index} to hold a `weight_map` of names of tensors to names of files.")
    for file in sorted(set(files.values())):
        inside = not PurePosixPath(file.replace("\\", "/")).is_absolute() and ".." not in re.split(r"[/\\]", file)
        if not inside or not file.endswith(".safetensors"):
            raise ValueError(f"Expected {index} to name safetensors files inside its folder, but got {file!r}.")
    tensors: dict[str, Tensors] = {file: Tensors() for file in sorted(set(files.values()))}
    for file, found in tensors.items():
        found.add(folder / file)
    absent = [name for name, file in files.items() if name not in tensors[file].shapes]
    if absent:
        raise ValueError(
            f"Expected {folder / files[absent[0]]} to hold {absent[0]!r}, as {INDEX} says, but it does not."
        )
    return [folder / file for file in tensors]


def stored_tensors(folder: Path) -> Tensors:
    """What the weights of a model's folder are, by the headers of its files.

    Args:
        folder: The folder.

    Raises:
        ValueError: As :func:`weight_files`, or if a file is not whole.
    """
    tensors = Tensors()
    for file in weight_files(folder):
        tensors.add(file)
    return tensors


def check_config(file: Path, tensors: Tensors | None = None) -> dict[str, Any]:
    """Read a config and refuse one that would run code, load from elsewhere, or describes what the files cannot hold.

    Args:
        file: A config.json.
        tensors: What the weights are; None: not known.

    Returns:
        Its content.

    Raises:
        ValueError: If it is such a config; the message names the file.
    """
    config = read_json(file)
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ValueError(f"Expected {file} to hold a list of names as `architectures`, but got {named!r}.")
    if (file.parent / "adapter_config.json").exists():
        raise ValueError(
            f"Expected {file.parent} to hold a whole model, but got an adapter (adapter_config.json). Load it with "
            "peft, merge it into its base (`merge_and_unload`) and save that, or pass the model."
        )
    if "transformers_weights" in config:
        raise ValueError(f"Expected {file} to leave the names of the weights' files to transformers, but it names one.")
    for key, value in _entries(config):
        if key.strip("_").endswith("attn_implementation") and "/" in str(value):
            raise ValueError(f"Expected {file} to name no code to load, but got {key}={value!r}.")
        if tensors is None or not isinstance(value, int) or not _SIZE.search(key) or _NO_SIZE.search(key):
            continue
        # An ALBERT runs one layer often, and small models have small files.
        most = max(len(tensors.shapes), 1000) if _LAYERS.search(key) else max(tensors.elements, 2**20)
        if abs(value) > most:
            shown = f"{value:,}" if abs(value) < 10**15 else f"a number of {len(str(value))} digits"
            raise ValueError(
                f"Expected {file} to describe the weights beside it, {tensors.elements:,} numbers in "
                f"{len(tensors.shapes):,} tensors, but got {key}={shown}."
            )
    return config


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with each value that stands under it, in inner dictionaries and lists too."""
    for key, value in config.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield from _entries(item)
            else:
                yield key, item


def on_meta(architecture: Any, settings: Any, where: Path | str) -> nn.Module:
    """The model that a config describes, without memory for its weights.

    Args:
        architecture: Its class.
        settings: The config.
        where: Where it is from, for the error.

    Raises:
        ValueError: If there can be no such model.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = architecture(settings)
    except BROKEN as error:
        raise ValueError(
            f"Expected {where} to describe a {getattr(architecture, '__name__', architecture)}, but got: "
            f"{one_line(error)}"
        ) from error
    return model


def check_size(model: nn.Module, stored: int, where: Path | str) -> None:
    """Refuse a model that needs far more memory than its files can fill.

    Args:
        model: From :func:`on_meta`.
        stored: How many numbers its files can hold.
        where: Where it is from, for the error.

    Raises:
        ValueError: If it does.
    """
    needed = sum(tensor.numel() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    if needed > stored + _SLACK:
        raise ValueError(
            f"Expected {where} to describe the weights beside it, {stored:,} numbers, but got a model of {needed:,}."
        )


@contextmanager
def without_reports() -> Iterator[None]:
    """Keep transformers from printing its table of the weights that did not fit: an error of ours says it."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_news(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return "LOAD REPORT" not in said and "tied weight" not in said

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def some(names: Iterable[str]) -> str:
    """The first names of many."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
