"""A teacher without its weights, in whose place a cache answers."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_distill.models.embedding import FIELD, embedding_class
from lightning_distill.models.wrapped import inside
from lightning_distill.teachers.cache.format import FILE, read_description, read_json, shortly, write_whole

_CONFIG = "config.json"
# What a config may say that makes transformers look for code, here or on the hub; none of it describes a layer.
_NEVER = {"auto_map", "attn_implementation", "_attn_implementation", "quantization_config", "custom_pipelines"}
# The most of what takes room even without weights, by a word in its name.
_MOST = {"layer": 4096, "depth": 4096, "expert": 4096, "label": 10**6, "position": 2**24}
# Whatever transformers does with settings that nobody would choose.
_BAD_CONFIG: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError, StrictDataclassError),
)


def save_teacher(teacher: nn.Module, folder: Path) -> None:
    """Write a transformers teacher's config beside its signals, for :func:`cached_teacher`."""
    teacher = inside(teacher)
    config: Any = getattr(teacher, "config", None)
    if isinstance(config, transformers.PretrainedConfig) and not (folder / _CONFIG).exists():
        written = config.to_dict() | {"architectures": [type(teacher).__name__.removeprefix("FSDP")]}
        write_whole(folder / _CONFIG, json.dumps(written, indent=1, default=str))


def cached_teacher(folder: str | os.PathLike[str]) -> nn.Module:
    """The teacher that a cache was filled by, without a weight. No code is run and nothing is asked of the hub.

    Args:
        folder: Of the cache.

    Returns:
        The teacher's class with its config and no parameters.

    Raises:
        ValueError: If there is no cache, its teacher was no transformers model, or what is written of it is no model's
            config.
    """
    try:
        description = read_description(folder)
        if description is None:
            raise FileNotFoundError(f"there is no {FILE}")
        teacher = bare(_plan(read_json(Path(folder) / _CONFIG)))
    except _BAD_CONFIG as error:
        raise ValueError(
            f"Expected argument `path` to be the cache of a transformers teacher, but got {os.fspath(folder)!r}: "
            f"{shortly(str(error), 300)}. Fill one first: `lightning-distill cache`."
        ) from error
    teacher.cached_fingerprint = description["teacher"]
    return teacher


def _plan(values: dict[str, Any]) -> Any:
    """The config that a file's values describe, if transformers itself knows it and the model it names."""
    kind: Any = values.get("model_type")
    architecture = values.get("architectures")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    name = architecture[0] if isinstance(architecture, list) and architecture else None
    model: Any = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    fits = known and isinstance(model, type) and issubclass(model, transformers.PreTrainedModel)
    if not fits or model.config_class is not CONFIG_MAPPING[kind]:
        raise ValueError(f"transformers has no model {name!r} of type {kind!r}")
    _check_sizes("", values)
    return CONFIG_MAPPING[kind].from_dict(_without(values))


def _check_sizes(name: str, value: Any) -> None:
    """Refuse a number of layers, or a size, that no machine has."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check_sizes(key if isinstance(key, str) else name, part)
    elif isinstance(value, int) and abs(value) > min(
        (most for word, most in _MOST.items() if word in name), default=2**31
    ):
        raise ValueError(f"`{name}` is {value}")


def _without(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without(value) for key, value in values.items() if key not in _NEVER}
    return values


def bare(config: Any) -> nn.Module:
    """The transformers model that a config describes, without a parameter or a buffer: nothing to move, send or train.

    Args:
        config: With the name of the class in ``architectures``.

    Returns:
        A model that knows its layers and cannot run.
    """
    kind = embedding_class(config) if hasattr(config, FIELD) else getattr(transformers, config.architectures[0])
    with torch.device("meta"):
        model: nn.Module = kind(config)
    for module in model.modules():
        module._parameters = dict.fromkeys(module._parameters)
        module._buffers = dict.fromkeys(module._buffers)
    return model
