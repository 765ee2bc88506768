"""Models as a folder or a hub id, in and out."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import transformers
from torch import nn

from lightning_distill.folders import writing
from lightning_distill.wrapped import compiled_in_place


def load_pretrained(model: nn.Module | str | os.PathLike[str], name: str = "model") -> nn.Module:
    """Load a transformers model with the head its config names; a module comes back as it is.

    What ``torch.compile`` returned comes back as the module inside it, compiled in place. Only safetensors are read,
    and code beside the model is never run: whoever trusts it says so by name, to
    ``from_pretrained(..., trust_remote_code=True)``, and passes the model.

    Args:
        model: A module, a local folder, or a hub id.
        name: What the argument is called where the user gave it, for the error.

    Returns:
        The model, in float32.

    Raises:
        ValueError: If the folder's config names no class of transformers, or only a body without a head.
        TypeError: If ``model`` is neither a module nor a path.
    """
    if isinstance(model, nn.Module):
        return compiled_in_place(model)
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"Expected argument `{name}` to be an nn.Module, a folder or a hub id, but got {type(model).__name__}."
        )
    architecture = architecture_of(os.fspath(model), name)
    loaded: nn.Module = architecture.from_pretrained(
        os.fspath(model), use_safetensors=True, dtype="float32", trust_remote_code=False
    )
    return loaded


def architecture_of(path: str, name: str) -> Any:
    """The class with a head that the config of a transformers folder or hub id names.

    Args:
        path: The folder or hub id.
        name: What the argument is called where the user gave it, for the error.

    Raises:
        ValueError: If there is no config, or it names no class of transformers with a head.
    """
    config = read_config(path, name)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if not has_head(config) or not hasattr(transformers, architecture):
        raise ValueError(
            f"Expected argument `{name}` to be a model with a head, but the config of {path!r} names "
            f"{architecture or 'no architecture'}. Load it yourself with the head you need, for example "
            f"`AutoModelForSequenceClassification.from_pretrained({path!r}, num_labels=...)`, and pass the model."
        )
    return getattr(transformers, architecture)


def read_config(path: str, name: str) -> Any:
    """The config of a transformers folder or hub id.

    Args:
        path: The folder or hub id.
        name: What the argument is called where the user gave it, for the error.

    Raises:
        ValueError: If there is none.
    """
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected argument `{name}` to be a folder or hub id of a transformers model, but got {path!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def has_head(config: Any) -> bool:
    """Whether a transformers config was saved by a model with a task head."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    return "For" in architecture or architecture.endswith("LMHeadModel")


def export(model: nn.Module, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Write a model so that others load it without this library.

    A transformers model becomes a folder for ``from_pretrained``. Any other module becomes ``model.safetensors`` and
    ``config.json``, which holds its class and its hyper-parameters (``model.hparams``, where it has them). Ramps for
    early exit go beside them, into ``ramps.safetensors`` and ``early_exit.json``.

    Args:
        model: The model.
        folder: Where to write: a new folder, or one that was written here; see
            :func:`lightning_distill.folders.writing`.
        tokenizer: A transformers tokenizer to save beside the model.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds anything else, or is the one that the model was loaded from.
    """
    with writing(folder, sources=source_of(model)) as draft:
        write_model(model, draft, tokenizer)
    return Path(folder)


def source_of(model: nn.Module) -> list[str]:
    """The folder that a model was loaded from, in a list; an empty one where it was made, or is of the hub."""
    path = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    return [path] if path and Path(path).is_dir() else []


def write_model(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Write what :func:`export` writes into a folder that is there.

    Args:
        model: The model.
        folder: The folder.
        tokenizer: A transformers tokenizer to save beside the model.
    """
    with without_ramps(model, folder):
        if isinstance(model, transformers.PreTrainedModel):
            model.save_pretrained(folder)
        else:
            safetensors.torch.save_model(model, str(folder / "model.safetensors"))
            hparams = dict(getattr(model, "hparams", {}))
            config = {"class_path": f"{type(model).__module__}.{type(model).__qualname__}", "init_args": hparams}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def without_ramps(model: nn.Module, folder: Path) -> Iterator[None]:
    """Let a model be written as others know it, its ramps for early exit, if it has any, into files of their own.

    Args:
        model: The model.
        folder: Where it is written.
    """
    ramps: Any = model._modules.get("ramps")
    if not hasattr(ramps, "save"):
        yield
        return
    del model._modules["ramps"]
    try:
        yield
    finally:
        model._modules["ramps"] = ramps
    ramps.save(folder)
