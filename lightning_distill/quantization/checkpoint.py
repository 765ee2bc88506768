"""The common GPTQ checkpoint: a folder with safetensors, config.json and quantize_config.json."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_distill.models.class_names import class_names, class_order, names_of_config
from lightning_distill.models.exporting import WRITERS, describe, source_of, without_ramps
from lightning_distill.models.files import (
    BROKEN,
    INDEX,
    WEIGHTS,
    Tensors,
    check_config,
    check_size,
    on_meta,
    one_line,
    read_json,
    weight_files,
)
from lightning_distill.models.folders import check_folder, writing
from lightning_distill.models.pretrained import class_of
from lightning_distill.quantization.experts import separate_experts
from lightning_distill.quantization.linear import QuantEmbedding, QuantLinear, why_not_packable
from lightning_distill.quantization.packing import pack, unpack_zeros


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """What config.json and quantize_config.json say of a quantised model; nothing of the calibration data.

    Args:
        model: A model with :class:`QuantLinear` layers.

    Returns:
        The dictionary; bits and group size are those of most layers, others are listed under ``dynamic``, which
        gptqmodel and vLLM know and optimum does not: plain ``from_pretrained`` loads models of one setting.

    Raises:
        ValueError: If the model has no quantised layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError("Expected argument `model` to have quantised layers, but it has none; call `quantize` first.")
    # One group over all inputs has its own name, as layers differ in width.
    whole = all(layer.group_size == layer.in_features for layer in layers.values())
    settings = [(layer.bits, -1 if whole else layer.group_size) for layer in layers.values()]
    bits, group_size = max(sorted(set(settings)), key=settings.count)
    middle = {b: 2 ** (b - 1) for b in (2, 3, 4, 8)}
    sym = all(bool((unpack_zeros(layer.qzeros, layer.bits) == middle[layer.bits]).all()) for layer in layers.values())
    ordered = any(bool((layer.g_idx.diff() < 0).any()) for layer in layers.values())
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": ordered,
        "lm_head": False,
    }
    others = {name: setting for name, setting in zip(layers, settings, strict=True) if setting != (bits, group_size)}
    if others:
        config["dynamic"] = {name: {"bits": b, "group_size": size} for name, (b, size) in others.items()}
    embeddings = [module.bits for module in model.modules() if isinstance(module, QuantEmbedding)]
    if embeddings:
        config["embedding_bits"] = embeddings[0]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for block in lists if any(name.startswith(block + ".") for name in layers)]
    if blocks:
        config["block_name_to_quantize"] = blocks[0]
        inside = {name.removeprefix(blocks[0] + ".").partition(".")[2] for name in layers if name.startswith(blocks[0])}
        config["modules_in_block_to_quantize"] = [sorted(inside)]
    return config


def save(model: nn.Module, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Write a quantised model in the format that transformers, gptqmodel and vLLM load.

    The folder appears whole or not at all.

    Args:
        model: A model from ``quantize``.
        folder: Where to write; see :func:`lightning_distill.models.folders.writing`.
        tokenizer: A transformers tokenizer to save beside it.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no quantised layer, or the folder holds what was not written here, or the float
            model.
        OSError: If the disk has no room for it.
    """
    quantization_config(model)  # refuses a model in floating point
    parent = next(parent for parent in check_folder(folder, sources=source_of(model)).parents if parent.exists())
    needed = sum(tensor.numel() * tensor.element_size() for tensor in _state(model).values()) + 2**20
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(f"Expected room for {needed:,} bytes at {parent}, but {free:,} are free; free some.")
    with writing(folder, sources=source_of(model)) as draft:
        write_quantized(model, draft, tokenizer)
    return Path(folder)


def write_quantized(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Write what :func:`save` writes into a folder that is there.

    Args:
        model: The model.
        folder: The folder.
        tokenizer: A transformers tokenizer to save beside it.
    """
    config = quantization_config(model)
    with without_ramps(model, folder):
        if isinstance(model, transformers.PreTrainedModel):
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
            described = json.loads((folder / "config.json").read_text())
        else:
            described = describe(model)
        safetensors.torch.save_file(_state(model), folder / "model.safetensors", {"format": "pt"})
    described["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    (folder / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


WRITERS[QuantLinear] = write_quantized


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Every weight once, but for those of ramps, which have files of their own."""
    state: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if name.startswith("ramps.") or (tensor.numel() and key in seen):
            continue
        seen.add(key)
        state[name] = tensor.detach().cpu().contiguous()
    return state


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a GPTQ checkpoint, ours or another tool's, into packed layers on the CPU.

    Args:
        folder: A folder with config.json and one or more safetensors files.
        model: A float model of the right shape to fill, for a module that cannot be built from config.json.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: If the folder holds no GPTQ checkpoint, or one that does not fit the model.
    """
    folder = Path(folder)
    try:
        return _load(folder, model)
    except BROKEN as error:
        said = one_line(error)
        if isinstance(error, ValueError) and said.startswith("Expected"):
            raise
        raise ValueError(f"Expected argument `folder` to hold a GPTQ checkpoint, but got {folder}: {said}") from error


def _load(folder: Path, model: nn.Module | None) -> nn.Module:
    config = check_config(folder / "config.json")
    version, files, stored = _version(folder, config), _files(folder), Tensors()
    for file in files:
        stored.add(file)
    check_config(folder / "config.json", stored)
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(safetensors.torch.load_file(file))
    if model is None:
        model = _build(folder, config, stored)
    else:
        _check_classes(folder, config, model)
    separate_experts(model, {key.partition(".experts.")[0] + ".experts" for key in state if ".experts.0." in key})
    names = [key.removesuffix(".qweight") for key in state if key.endswith(".qweight")]
    names += _tied(model, names, state)
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            bits = state[f"{name}.qweight"].shape[1] * 32 // module.embedding_dim
            new: nn.Module = QuantEmbedding(module.num_embeddings, module.embedding_dim, bits, module.padding_idx)
        else:
            new = _empty_linear(module, name, state, version)
        model.set_submodule(name, new)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        missing = [key for key in missing if key not in tied]
    if missing or unexpected:
        raise ValueError(
            f"Expected the checkpoint at {folder} to fit {type(model).__name__}, but {missing[:3]} are missing and "
            f"{unexpected[:3]} are not its own."
        )
    return model.eval()


def _version(folder: Path, config: dict[str, Any]) -> str:
    """Which version of the format a folder says that it has."""
    described = config.get("quantization_config")
    if not described and (folder / "quantize_config.json").exists():
        described = {"quant_method": "gptq", **read_json(folder / "quantize_config.json")}
    if described is not None and not isinstance(described, dict):
        raise ValueError(f"Expected {folder / 'config.json'} to hold a dictionary as `quantization_config`.")
    method = (described or {}).get("quant_method")
    version = (described or {}).get("checkpoint_format", "gptq")
    if method != "gptq" or version not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"Expected argument `folder` to hold a GPTQ checkpoint (`gptq` or `gptq_v2`), but {folder} says "
            f"quant_method={method!r}, checkpoint_format={version!r}."
        )
    return version


def _files(folder: Path) -> list[Path]:
    named = any(os.path.lexists(folder / file) for file in (WEIGHTS, INDEX))
    others = sorted(set(folder.glob("*.safetensors")) - {folder / "ramps.safetensors"})  # other tools name them freely
    return weight_files(folder) if named or not others else others


def _check_classes(folder: Path, config: dict[str, Any], model: nn.Module) -> None:
    """Refuse a model whose classes are in another order than those of the folder."""
    own, names_there = class_names(model, "model"), names_of_config(SimpleNamespace(**config), str(folder))
    if own and names_there and class_order(own, names_there, "model", str(folder)) is not None:
        raise ValueError(
            f"Expected argument `model` to have the classes of {folder} in their order, {names_there}, but got "
            f"{own}. Give it the `id2label` of the folder's config.json."
        )


def _build(folder: Path, config: dict[str, Any], stored: Tensors) -> nn.Module:
    if "class_path" in config:
        module, _, name = config["class_path"].rpartition(".")
        try:
            # Only a class that the program has imported itself: a folder from elsewhere could name any function, with
            # any arguments, and importing a module runs it.
            kind = getattr(sys.modules[module], name) if module in sys.modules else None
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise ImportError("it is no nn.Module that was imported; import its module before")
            built: nn.Module = kind(**config["init_args"])
        except BROKEN as error:
            raise ValueError(
                f"Expected {folder / 'config.json'} to say how to build {config['class_path']}, but it failed: "
                f"{one_line(error)}. Pass a float model of the same shape as `model`."
            ) from error
        return built
    settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    architecture = class_of(settings)
    if architecture is None or not isinstance(settings, architecture.config_class):
        raise ValueError(
            f"Expected {folder / 'config.json'} to name a class of transformers, but got {settings.architectures}."
        )
    # Two bits are the fewest: sixteen numbers in one.
    check_size(on_meta(architecture, settings, folder / "config.json"), 16 * stored.elements, folder)
    model: nn.Module = architecture(settings)
    return model


def _tied(model: nn.Module, names: list[str], state: dict[str, Tensor]) -> list[str]:
    """Names of layers whose float weight is that of a packed one; they get its integers, which are stored once."""
    owners = {id(model.get_submodule(name).weight): name for name in names}
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        owner = owners.get(id(getattr(module, "weight", None)), name)
        if owner != name and name not in names and type(module) is type(model.get_submodule(owner)):
            kept = {key: value for key, value in state.items() if key.startswith(f"{owner}.")}
            if model.get_submodule(owner) is not module:
                kept.pop(f"{owner}.bias", None)
            for key, value in kept.items():
                state.setdefault(name + key.removeprefix(owner), value)
            found.append(name)
    return found


def _empty_linear(module: nn.Module, name: str, state: dict[str, Tensor], version: str) -> QuantLinear:
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise ValueError(f"Expected `{name}` to be a linear layer, but it is {type(module).__name__}.")
    rows, columns = module.weight.shape
    in_features, out_features = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
    bits = state[f"{name}.qweight"].shape[0] * 32 // in_features
    g_idx, scales = state[f"{name}.g_idx"], state[f"{name}.scales"]
    for key in ("qweight", "qzeros", "g_idx"):
        if state[f"{name}.{key}"].is_floating_point():
            raise ValueError(f"Expected `{name}.{key}` to hold whole numbers, but got {state[f'{name}.{key}'].dtype}.")
    if len(g_idx) != in_features or not bool(((g_idx >= 0) & (g_idx < len(scales))).all()):
        raise ValueError(
            f"Expected `{name}.g_idx` to number the group of each of {in_features} inputs, from 0 to {len(scales) - 1}."
        )
    group_size = int((g_idx == g_idx[0]).sum())
    if version == "gptq_v2":
        zeros = unpack_zeros(state[f"{name}.qzeros"], bits, version=2)
        state[f"{name}.qzeros"] = pack(((zeros - 1) % 2**bits).T, bits).T.contiguous()
    if state[f"{name}.scales"].dtype != torch.float32:
        state[f"{name}.scales"] = state[f"{name}.scales"].half()
    reason = why_not_packable(in_features, out_features, bits)
    if reason:
        raise ValueError(f"Expected layers that fill whole 32-bit words, but got `{name}`: {reason}.")
    layer = QuantLinear(in_features, out_features, bits, group_size, f"{name}.bias" in state)
    if layer.bias is not None:
        layer.bias = layer.bias.to(state[f"{name}.bias"].dtype)
    return layer
