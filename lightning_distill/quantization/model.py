"""Quantise a whole model, layer after layer in forward order."""

import copy
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_distill.quantization.calibration import Forward, calibrate, call_model
from lightning_distill.quantization.gptq import BITS, Hessian, QuantizedWeight, gptq_layer
from lightning_distill.quantization.linear import QuantEmbedding, QuantLinear, why_not_packable

#: Heads, poolers, ramps and routers: few bytes, and errors there are not made good by anything after them.
EXCLUDE = (
    *("lm_head", "head", "classifier", "pre_classifier", "classification_head", "pooler", "score", "cls"),
    *("qa_outputs", "embed_out", "vocab_*", "ramp", "ramps", "gate", "router"),
)


@dataclass
class LayerReport:
    """What quantising one layer cost.

    Attributes:
        name: The layer's name in the model.
        shape: ``(out, in)``.
        bits: Bits of its codes; 0 if it was left in floating point.
        group_size: Inputs that share a scale.
        error: Relative squared error of its output on the calibration inputs.
        rounding_error: The same for rounding to nearest.
        seconds: Time, shared out by outputs among the layers with one input.
        note: What was done otherwise than asked, and why; empty where nothing was.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    error: float
    rounding_error: float
    seconds: float
    note: str = ""


def quantize(
    model: nn.Module,
    dataloader: Iterable[Any] | None,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    desc_act: bool = True,
    static_groups: bool = True,
    mse: bool = False,
    damp_percent: float = 0.01,
    embedding_bits: int | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = EXCLUDE,
    bits_by_pattern: Mapping[str, int] | None = None,
    group_size_by_pattern: Mapping[str, int] | None = None,
    num_samples: int = 256,
    forward: Forward = call_model,
    resume: str | os.PathLike[str] | None = None,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> tuple[nn.Module, list[LayerReport]]:
    """Quantise every linear layer of a copy of a model by GPTQ; the model itself is not touched.

    Patterns are those of ``fnmatch`` and match a layer's whole name or one part of it between dots. A group that does
    not divide the width shrinks to 64 or 32; a layer that the format cannot hold stays in floating point. Both are
    said in the report.

    Args:
        model: Any module with ``nn.Linear`` or transformers' ``Conv1D`` layers.
        dataloader: Calibration batches; None rounds every layer to nearest.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; -1 for all.
        sym: See :func:`gptq_layer`, also for ``desc_act``, ``static_groups``, ``mse`` and ``damp_percent``.
        desc_act: Inputs in order of activation.
        static_groups: Grids fixed beforehand.
        mse: Search smaller ranges.
        damp_percent: Damping.
        embedding_bits: 8 or 4 rounds large embeddings row by row (plain transformers cannot load those); None
            leaves them.
        include: Patterns of the layers to quantise.
        exclude: Patterns of the layers to leave.
        bits_by_pattern: Other bits for some layers; 0 leaves them in floating point.
        group_size_by_pattern: Other group sizes for some layers.
        num_samples: Rows of calibration data to use.
        forward: Calls the model on a batch.
        resume: A folder that keeps finished layers, so that a second call goes on where the first was killed.
        on_layer: Called with each report as a layer is done.

    Returns:
        The quantised copy, in eval mode, and a report per layer.

    Raises:
        ValueError: If an option is outside its set, the model is quantised already, no layer matches, there is no
            calibration data, or activations are not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.quantization import quantize
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        >>> data = [torch.randn(64, 64) for _ in range(4)]
        >>> quantized, report = quantize(model, data, group_size=32)
        >>> [type(layer).__name__ for layer in quantized]
        ['QuantLinear', 'ReLU', 'QuantLinear']
        >>> all(layer.error < layer.rounding_error for layer in report)
        True
    """
    for value in (bits, *(bits_by_pattern or {}).values()):
        if value not in (*BITS, 0) or bits == 0:
            raise ValueError(f"Expected argument `bits` to be one of {BITS}, but got {value}.")
    for value in (group_size, *(group_size_by_pattern or {}).values()):
        if value not in (-1, 32, 64, 128):
            raise ValueError(f"Expected argument `group_size` to be one of (-1, 32, 64, 128), but got {value}.")
    if embedding_bits not in (None, 4, 8):
        raise ValueError(f"Expected argument `embedding_bits` to be None, 4 or 8, but got {embedding_bits}.")
    already = any(isinstance(module, (QuantLinear, QuantEmbedding)) for module in model.modules())
    if already or getattr(getattr(model, "config", None), "quantization_config", None):
        raise ValueError("Expected argument `model` to be in floating point, but it is quantised already.")

    model = copy.deepcopy(model).eval()
    layers, aliases = _linear_layers(model, include, exclude)
    plan: dict[str, tuple[int, int]] = {}
    reports: dict[str, LayerReport] = {}
    for name, layer in layers.items():
        width = _weight(layer).shape[1]
        layer_bits = _by_pattern(name, bits_by_pattern, bits)
        size = _by_pattern(name, group_size_by_pattern, group_size)
        smaller = next((size for size in (size, 64, 32) if size == -1 or width % size == 0), 0)
        reason = why_not_packable(width, len(_weight(layer)), layer_bits or 4)
        if reason or not layer_bits:
            note = f"left in floating point: {reason or 'asked for'}"
            reports[name] = LayerReport(name, _shape(layer), 0, size, 0.0, 0.0, 0.0, note)
        else:
            plan[name] = (layer_bits, smaller)
    if not plan:
        raise ValueError(
            f"Expected arguments `include` {list(include)} and `exclude` {list(exclude)} to leave linear layers that "
            f"the format can hold, but none is left of {len(layers)}; their widths must divide by 32."
        )
    options: dict[str, Any] = {
        "sym": sym, "desc_act": desc_act, "static_groups": static_groups, "mse": mse, "damp_percent": damp_percent
    }  # fmt: skip
    packed: dict[str, QuantLinear] = {}

    def finish(name: str, layer: QuantLinear, report: LayerReport) -> None:
        packed[name], reports[name] = layer, report
        # Suspended forwards still hold the float layer: give it the quantised values until the walk is over.
        dense = layer.dequantize()
        weight = layers[name].weight
        assert isinstance(weight, Tensor)
        weight.data.copy_(dense.T if isinstance(layers[name], Conv1D) else dense)
        if on_layer is not None:
            on_layer(report)

    signature = json.dumps([plan, options, num_samples, dataloader is None], sort_keys=True)
    for name in plan:
        kept = _load_finished(resume, name, signature, layers[name])
        if kept is not None:
            finish(name, *kept)
    rest = {name: layers[name] for name in plan if name not in packed}
    short: list[str] = []
    for names, inputs in _inputs(model, rest, dataloader, num_samples, forward):
        hessian = None
        if inputs:
            hessian = Hessian(inputs[0].shape[-1], inputs[0].device)
            for rows in inputs:
                if not bool(rows.isfinite().all()):
                    raise ValueError(f"Expected finite inputs of layer `{names[0]}`, but got NaN or infinite values.")
                hessian.update(rows)
        for setting in sorted({plan[name] for name in names}):
            together = [name for name in names if plan[name] == setting]
            started = time.perf_counter()
            results, note = _quantize_together([layers[name] for name in together], hessian, *setting, **options)
            seconds = time.perf_counter() - started
            if hessian is not None and hessian.count < len(hessian.matrix()):
                short += [f"{name}: {hessian.count} of {len(hessian.matrix())}" for name in together]
            outputs = sum(len(result.codes) for result in results)
            for name, result in zip(together, results, strict=True):
                said = note
                asked = _by_pattern(name, group_size_by_pattern, group_size)
                if asked not in (-1, result.group_size):
                    said = f"{note}; group {asked} does not divide {result.codes.shape[1]}".lstrip("; ")
                share = seconds * len(result.codes) / outputs
                report = LayerReport(
                    name, _shape(layers[name]), result.bits, result.group_size, result.error, result.rounding_error,
                    share, said,
                )  # fmt: skip
                layer = QuantLinear.from_weight(result, _bias(layers[name]))
                _save_finished(resume, name, signature, layer, report)
                finish(name, layer, report)
    for name in rest:
        if name not in packed:
            # No token came here: a layer that is not called, or an expert that nobody was routed to.
            note = "rounded to nearest: no calibration input reached it" if dataloader is not None else ""
            (result,), _ = _quantize_together([layers[name]], None, *plan[name], **options)
            report = LayerReport(
                name, _shape(layers[name]), result.bits, result.group_size, result.error, result.rounding_error,
                0.0, note,
            )  # fmt: skip
            finish(name, QuantLinear.from_weight(result, _bias(layers[name])), report)
    if short:
        warnings.warn(
            "Expected at least as many calibration tokens as a layer has inputs, but got fewer, so that the rank of H "
            f"is at most: {'; '.join(short[:3])}{' ...' if len(short) > 3 else ''}. Damping fills the rest; raise "
            "`num_samples`.",
            stacklevel=2,
        )
    for name in packed:
        for alias in aliases[name]:
            model.set_submodule(alias, packed[name])
    if embedding_bits is not None:
        _quantize_embeddings(model, embedding_bits)
    return model, [reports[name] for name in layers]


def _quantize_together(
    layers: list[nn.Module], hessian: Hessian | None, bits: int, group_size: int, **options: Any
) -> tuple[list[QuantizedWeight], str]:
    # Rows of a weight do not know of each other: layers with the same input are one layer with more outputs.
    weights = [_weight(layer) for layer in layers]
    matrix = None if hessian is None or not hessian.matrix().any() else hessian.matrix()
    result = gptq_layer(torch.cat(weights), matrix, bits=bits, group_size=group_size, **options)
    note = ""
    if hessian is not None and matrix is None:
        note = "rounded to nearest: every calibration input is zero"
    elif result.damp_percent > options["damp_percent"]:
        note = f"damping raised to {result.damp_percent:g}"
    stops = torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()
    return [result.rows(stop - len(weight), stop) for weight, stop in zip(weights, stops, strict=True)], note


def _inputs(
    model: nn.Module, layers: dict[str, nn.Module], dataloader: Iterable[Any] | None, num_samples: int, forward: Forward
) -> Iterable[tuple[list[str], list[Tensor]]]:
    if dataloader is None or not layers:
        return ()
    weight = next(model.parameters())
    batches: list[Any] = []
    count = 0
    for batch in dataloader:
        if count >= num_samples:
            break
        batches.append(_first_rows(batch, num_samples - count, weight.device))
        count += _rows(batches[-1])
    if not count:
        raise ValueError("Expected argument `dataloader` to give calibration batches, but it gave none.")
    return calibrate(model, layers, batches, forward)


def _first_rows(batch: Any, count: int, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch[:count].to(device)
    if isinstance(batch, Mapping):
        return {key: _first_rows(value, count, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_first_rows(value, count, device) for value in batch)
    return batch


def _rows(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((_rows(value) for value in values if isinstance(value, (Tensor, Mapping, tuple, list))), 0)


def _linear_layers(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """The layers to quantise by their first name, and every name that shares their weight."""
    held = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers: dict[str, nn.Module] = {}
    aliases: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # A subclass may compute something else, and out_proj of nn.MultiheadAttention is never called as a module.
        if type(module) not in (nn.Linear, Conv1D) or id(module.weight) in held:
            continue
        if not _matches(name, include) or _matches(name, exclude):
            continue
        owner = first.setdefault(id(module.weight), name)
        aliases.setdefault(owner, []).append(name)
        layers.setdefault(owner, module)
    return layers, aliases


def _quantize_embeddings(model: nn.Module, bits: int) -> None:
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    done: dict[int, QuantEmbedding] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Embedding or module.embedding_dim * bits % 32 or module.num_embeddings < 256:
            continue
        if id(module.weight) in tied:
            warnings.warn(
                f"Embedding `{name}` stays in floating point: an output head shares its weight.", stacklevel=3
            )
            continue
        model.set_submodule(name, done.setdefault(id(module), QuantEmbedding.from_embedding(module, bits)))


def _save_finished(resume: Any, name: str, signature: str, layer: QuantLinear, report: LayerReport) -> None:
    if resume is None:
        return
    folder = Path(resume)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"signature": signature, "report": json.dumps(asdict(report))}
    temporary = folder / f".{name}.partial"
    safetensors.torch.save_file(layer.state_dict(), temporary, metadata)
    temporary.replace(folder / f"{name}.safetensors")


def _load_finished(resume: Any, name: str, signature: str, layer: nn.Module) -> tuple[QuantLinear, LayerReport] | None:
    path = Path(resume) / f"{name}.safetensors" if resume is not None else None
    if path is None or not path.exists():
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if metadata["signature"] != signature:
            return None
        report = LayerReport(**json.loads(metadata["report"]))
        report.shape = _shape(layer)
        weight = _weight(layer)
        result = QuantLinear(weight.shape[1], len(weight), report.bits, report.group_size, _bias(layer) is not None)
        result.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return result.to(weight.device), report


def _matches(name: str, patterns: Sequence[str]) -> bool:
    parts = (name, *name.split("."))
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in parts)


def _by_pattern(name: str, values: Mapping[str, int] | None, default: int) -> int:
    return next((value for pattern, value in (values or {}).items() if _matches(name, (pattern,))), default)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def _bias(layer: nn.Module) -> Tensor | None:
    assert layer.bias is None or isinstance(layer.bias, Tensor)
    return layer.bias


def _shape(layer: nn.Module) -> tuple[int, int]:
    return len(_weight(layer)), _weight(layer).shape[1]
