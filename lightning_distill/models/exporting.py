"""Models written into a folder that others load without this library."""

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_distill.models.files import BROKEN, some
from lightning_distill.models.folders import writing

#: How a model is written that has layers of some class, for files of another form than that of its floats.
WRITERS: dict[type[nn.Module], Callable[[nn.Module, Path, Any], None]] = {}

_AROUND = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def export(model: nn.Module, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Write a model so that others load it without this library, or refuse.

    A transformers model becomes a folder for ``from_pretrained``, and so does a peft model, whose adapter is merged
    into a copy of its base. Any other module becomes ``model.safetensors`` and ``config.json``, which holds its class
    and its hyper-parameters (``model.hparams``, where it has them);
    :func:`~lightning_distill.models.pretrained.load_module` reads it again. What is around a model to compile it, to
    share it among processes or to average its weights stays out. Ramps for early exit go beside them, into
    ``ramps.safetensors`` and ``early_exit.json``. A model with GPTQ layers is written as
    :func:`lightning_distill.quantization.save` does.

    Args:
        model: The model.
        folder: Where to write: a new folder, or one that was written here; see
            :func:`lightning_distill.models.folders.writing`.
        tokenizer: A transformers tokenizer or image processor to save beside the model.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds anything else, or is the one that the model was loaded from; if the class of a
            transformers model would not take its weights (parametrised, pruned or replaced layers); if weights are
            torchao's, from ``quantize_int8``; if an adapter cannot be merged; or if a hyper-parameter is no JSON.
            Nothing is written then.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
        >>> from lightning_distill.models.pretrained import export
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> folder = export(BertForSequenceClassification(BertConfig(vocab_size=9, **sizes)), tempfile.mkdtemp())
        >>> sorted(path.name for path in folder.iterdir())
        ['config.json', 'lightning_distill.json', 'model.safetensors']
    """
    with writing(folder, sources=source_of(model)) as draft:
        write_model(model, draft, tokenizer)
    return Path(folder)


def source_of(model: nn.Module) -> list[str]:
    """The folder that a model was loaded from, in a list; an empty one where it was made, or is of the hub."""
    path = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    return [path] if path and Path(path).is_dir() else []


def write_model(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Write what :func:`export` writes into a folder that is there.

    Args:
        model: The model.
        folder: The folder.
        tokenizer: A transformers tokenizer to save beside the model.
    """
    model = _unwrapped(model)
    for kind, write in WRITERS.items():
        if any(isinstance(module, kind) for module in model.modules()):
            write(model, folder, tokenizer)
            return
    with without_ramps(model, folder):
        write_floats(_merged(model), folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_floats(model: nn.Module, folder: Path) -> None:
    """Write a model that has nothing around it, in it or beside it."""
    check_floats(model)
    if isinstance(model, transformers.PreTrainedModel):
        _check_loads(model)
        model.save_pretrained(folder)
        return
    # First what may be refused.
    described = json.dumps(describe(model), indent=2)
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(described + "\n")


def check_floats(model: nn.Module) -> None:
    """Refuse weights that are tensors of another library's own, such as torchao's, which no file here can hold.

    Args:
        model: The model to write.

    Raises:
        ValueError: If it has such weights.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            raise ValueError(
                f"Expected argument `model` to have weights in floating point, but got a {type(parameter).__name__} in "
                f"`{name}`. Export the model before `quantize_int8` and quantise what is loaded again; or give the "
                "float model to `quantization.quantize`, whose folders load everywhere, or to `export_onnx_int8`."
            )


def describe(model: nn.Module) -> dict[str, Any]:
    """Class and hyper-parameters of a module that is not of transformers.

    Raises:
        ValueError: If a hyper-parameter is no JSON.
    """
    hparams = dict(getattr(model, "hparams", {}))
    for name, value in hparams.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"Expected the hyper-parameters of {type(model).__name__} to be JSON, so that it can be made again, "
                f"but `{name}` is a {type(value).__name__}. Leave it out: `save_hyperparameters(ignore=[{name!r}])`."
            ) from error
    return {"class_path": f"{type(model).__module__}.{type(model).__qualname__}", "init_args": hparams}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what compiles it, shares it or averages it."""
    while True:
        inner = model._modules.get("module" if isinstance(model, _AROUND) else "_orig_mod")
        if inner is None:
            return model
        model = inner


def _merged(model: nn.Module) -> nn.Module:
    """A model without adapters: a copy of the base of a peft model, the adapter merged into it."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    peft = sys.modules.get("peft")
    if peft is None or tuners is None:
        return model
    adapted = isinstance(model, transformers.PreTrainedModel) and any(
        isinstance(module, tuners.BaseTunerLayer) for module in model.modules()
    )
    if not isinstance(model, peft.PeftModel) and not adapted:
        return model
    if adapted:  # by `model.add_adapter`
        model = copy.deepcopy(model)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, tuners.BaseTunerLayer):
                layer.merge(safe_merge=True)
                model.set_submodule(name, layer.get_base_layer())
        model._hf_peft_config_loaded = False  # type: ignore[assignment]
        return model
    if not callable(getattr(model.base_model, "merge_and_unload", None)):
        raise ValueError(
            f"Expected an adapter that can be merged into its base to export, but got a {type(model).__name__} with "
            f"{type(model.active_peft_config).__name__}. Save it with `save_pretrained`, beside its base."
        )
    copied: Any = copy.deepcopy(model)
    merged: nn.Module = copied.merge_and_unload(safe_merge=True)
    return merged


def _check_loads(model: transformers.PreTrainedModel) -> None:
    """Refuse a model whose weights its own class and config would not take."""
    if getattr(model, "hf_quantizer", None) is not None:
        return
    try:
        with torch.device("meta"):
            fresh = type(model)(copy.deepcopy(model.config)).state_dict()
    except BROKEN:
        return  # a class of the user's own, which is made of more than its config
    own = model.state_dict()
    others = {name for name in own if name not in fresh or own[name].shape != fresh[name].shape}
    others |= {name for name in fresh if name not in own}
    if others:
        raise ValueError(
            f"Expected a {type(model).__name__} as its config describes it, so that `from_pretrained` can load what is "
            f"written, but got others: {some(others)}. Take off what was put onto its layers (`prune.remove`, "
            "`parametrize.remove_parametrizations`), or say in its config what was changed."
        )


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
