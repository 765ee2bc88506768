"""Quantise a whole model, layer after layer in forward order."""

import copy
import os
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_distill.arguments import between, one_of, typed
from lightning_distill.quantization.calibration import Forward, calibrate, call_model, first_batches
from lightning_distill.quantization.experts import separate_experts
from lightning_distill.quantization.finished import FinishedLayers
from lightning_distill.quantization.gptq import BITS, Hessian, QuantizedWeight, gptq_layer, retarget
from lightning_distill.quantization.linear import QuantEmbedding, QuantLinear, why_not_packable
from lightning_distill.quantization.replaceable import copied, why_not_replaceable

#: Heads, poolers, ramps, routers and adapters: few bytes, and errors there are not made good by anything after them.
EXCLUDE = (
    *("lm_head", "head", "classifier", "pre_classifier", "classification_head", "pooler", "score", "cls"),
    *("qa_outputs", "embed_out", "vocab_*", "ramp", "ramps", "gate", "router"),
    "lora_*",  # adapters are small, and what they learned is smaller than a step of their weights' grid
)


@dataclass
class LayerReport:
    """What quantising one layer cost.

    Attributes:
        name: The layer's name in the model.
        shape: ``(out, in)``.
        bits: Bits of its codes; 0 if it was left in floating point.
        group_size: Inputs that share a scale.
        error: Relative squared error of its output on the calibration inputs; with ``asymmetric`` from the output that
            makes good what the layers before have lost.
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


@typed
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
    true_sequential: bool = True,
    asymmetric: bool | None = None,
    embedding_bits: int | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = EXCLUDE,
    bits_by_pattern: Mapping[str, int] | None = None,
    group_size_by_pattern: Mapping[str, int] | None = None,
    num_samples: int = 256,
    forward: Forward = call_model,
    resume: str | os.PathLike[str] | None = None,
    on_layer: Callable[[LayerReport, int], None] | None = None,
) -> tuple[nn.Module, list[LayerReport]]:
    """Quantise every linear layer of a copy of a model by GPTQ; the model itself is not touched.

    Experts that transformers fuses into one tensor become one linear layer each. One that fewer tokens reach than it
    has inputs is rounded.

    Patterns are those of ``fnmatch`` and match a layer's whole name or one part of it between dots. A group that does
    not divide the width shrinks to 64 or 32; a layer that the format cannot hold stays in floating point, and so does
    one that integers could not stand in for: of a class of its own, with hooks, or whose weight is computed
    (parametrised, tied to an embedding). All of this is said in the report. Who reads the weight of a quantised layer
    gets its numbers; writing to it is refused.

    Args:
        model: Any module with ``nn.Linear``, transformers' ``Conv1D`` or fused experts.
        dataloader: Calibration batches; None rounds every layer to nearest.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; -1 for all.
        sym: See :func:`gptq_layer`, also for ``desc_act``, ``static_groups``, ``mse`` and ``damp_percent``.
        desc_act: Inputs in order of activation.
        static_groups: Grids fixed beforehand.
        mse: Search smaller ranges.
        damp_percent: Damping.
        true_sequential: Calibrate each layer on what the quantised layers before it give; otherwise on what the float
            model gives.
        asymmetric: Ask each layer for the float model's outputs, though its inputs are the quantised model's (see
            :func:`retarget`); needs the memory of a second model. None: where ``bits`` is 2, which loses most.
        embedding_bits: 8 or 4 rounds large embeddings row by row (plain transformers cannot load those); None
            leaves them.
        include: Patterns of the layers to quantise.
        exclude: Patterns of the layers to leave.
        bits_by_pattern: Other bits for some layers; 0 leaves them in floating point.
        group_size_by_pattern: Other group sizes for some layers.
        num_samples: Rows of calibration data to use.
        forward: Calls the model on a batch.
        resume: A folder that keeps finished layers, so that a second call goes on where the first was killed.
        on_layer: Called with each report as a layer is done, and the number of layers.

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
    between("damp_percent", damp_percent, 0, 1, closed=True)
    check_options(
        bits,
        group_size,
        embedding_bits,
        bits_by_pattern,
        group_size_by_pattern,
        num_samples,
        true_sequential,
        asymmetric,
    )
    if asymmetric is None:
        asymmetric = bits == 2 and true_sequential and dataloader is not None
    if asymmetric and dataloader is None:
        raise ValueError("Expected argument `asymmetric` to come with calibration data, but got dataloader=None.")
    already = any(isinstance(module, (QuantLinear, QuantEmbedding)) for module in model.modules())
    if already or getattr(getattr(model, "config", None), "quantization_config", None):
        raise ValueError("Expected argument `model` to be in floating point, but it is quantised already.")

    model = copied(model)
    unknown = separate_experts(model)
    layers, aliases = _linear_layers(model, include, exclude)
    held = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    plan, reports = _plan(layers, held, bits, group_size, bits_by_pattern, group_size_by_pattern)
    reports |= {name: _left(name, note) for name, note in unknown.items()}
    if not plan:
        raise ValueError(
            f"Expected arguments `include` {list(include)}, `exclude` {list(exclude)} and `bits_by_pattern` "
            f"{dict(bits_by_pattern or {})} to leave linear layers that the format can hold, but none is left of "
            f"{len(layers)}; their widths must divide by 32."
        )
    options: dict[str, Any] = {
        "sym": sym, "desc_act": desc_act, "static_groups": static_groups, "mse": mse, "damp_percent": damp_percent
    }  # fmt: skip
    asked = [plan, options, num_samples, dataloader is None, true_sequential, asymmetric]
    finished = FinishedLayers(resume, asked, [_weight(layers[name]) for name in plan])
    twin = copy.deepcopy(model) if asymmetric else None
    packed: dict[str, QuantLinear] = {}

    def finish(name: str, layer: QuantLinear, report: LayerReport) -> None:
        packed[name], reports[name] = layer, report
        layer.take_place_of(layers[name])
        if true_sequential:
            # Suspended forwards still hold the float layer: give it the quantised values until the walk is over. In
            # memory of its own: another module may hold the same tensor, or a part of it.
            dense = layer.dequantize().to(layer.dtype)
            weight = nn.Parameter(dense.T if layer.transposed else dense, requires_grad=False)
            for alias in aliases[name]:
                model.get_submodule(alias).weight = weight
        if on_layer is not None:
            on_layer(report, len(plan))

    for name in plan:
        kept = finished.load(name)
        if kept is not None:
            finish(name, kept[0].to(_weight(layers[name]).device), LayerReport(**kept[1]))
    rest = {name: layers[name] for name in plan if name not in packed}
    short: list[str] = []
    for names, inputs, floats in _inputs(model, twin, rest, dataloader, num_samples, forward):
        hessian = Hessian(inputs[0].shape[-1], inputs[0].device)
        for rows in inputs:
            if not bool(rows.isfinite().all()):
                raise ValueError(f"Expected finite inputs of layer `{names[0]}`, but got NaN or infinite values.")
            hessian.update(rows)
        matrix: Tensor | None = hessian.matrix()
        assert matrix is not None
        note, width = "", len(matrix)
        if not bool(matrix.any()):
            matrix, note = None, "rounded to nearest: every calibration input is zero"
        elif hessian.count < width and "experts" in names[0].split("."):
            matrix, note = None, f"rounded to nearest: {hessian.count} tokens reached it, {width} are needed"
        elif hessian.count < width:
            short += [f"{name}: {hessian.count} of {width}" for name in names]
        drift = None
        if matrix is not None and twin is not None:
            drift = _drift(inputs, floats)
            note = "" if drift is not None else "not asymmetric: other tokens than in the float model reached it"
        for setting in sorted({plan[name] for name in names}):
            together = [name for name in names if plan[name] == setting]
            started = time.perf_counter()
            results = _quantize_together([layers[name] for name in together], matrix, drift, *setting, **options)
            seconds = time.perf_counter() - started
            outputs = sum(len(result.codes) for result in results)
            for name, result in zip(together, results, strict=True):
                layer = QuantLinear.from_weight(result, _bias(layers[name]))
                said = [note, _smaller_group(name, result, group_size_by_pattern, group_size)]
                if matrix is not None and result.damp_percent > damp_percent:
                    said.append(f"damping raised to {result.damp_percent:g}")
                share = seconds * len(result.codes) / outputs
                report = _report(name, result, share, "; ".join(filter(None, said)))
                finished.save(name, layer, asdict(report))
                finish(name, layer, report)
    for name in rest:
        if name not in packed:
            # No token came here: a layer that is not called, or an expert that nobody was routed to.
            note = "rounded to nearest: no calibration input reached it" if dataloader is not None else ""
            (result,) = _quantize_together([layers[name]], None, None, *plan[name], **options)
            finish(name, QuantLinear.from_weight(result, _bias(layers[name])), _report(name, result, 0.0, note))
    if short:
        warnings.warn(
            "Expected at least as many calibration tokens as a layer has inputs, but got fewer, so that the rank of H "
            f"is at most: {'; '.join(short[:3])}{' ...' if len(short) > 3 else ''}. Damping fills the rest; raise "
            "`num_samples`.",
            stacklevel=2,
        )
    for name in packed:
        for alias in aliases[name]:
            model.set_submodule(alias, packed[name].beside(model.get_submodule(alias)))
    embeddings = {} if embedding_bits is None else _quantize_embeddings(model, embedding_bits)
    reports |= {name: _left(name, note) for name, note in embeddings.items()}
    return model, [reports[name] for name in (*layers, *unknown, *embeddings)]


def check_options(
    bits: int,
    group_size: int,
    embedding_bits: int | None,
    bits_by_pattern: Mapping[str, int] | None,
    group_size_by_pattern: Mapping[str, int] | None,
    num_samples: int,
    true_sequential: bool,
    asymmetric: bool | None,
) -> None:
    """Refuse what :func:`quantize` cannot do."""
    one_of("bits", bits, BITS)
    one_of("group_size", group_size, (-1, 32, 64, 128))
    for value in (bits_by_pattern or {}).values():
        one_of("bits_by_pattern", value, (*BITS, 0))
    for value in (group_size_by_pattern or {}).values():
        one_of("group_size_by_pattern", value, (-1, 32, 64, 128))
    if embedding_bits not in (None, 4, 8):
        raise ValueError(f"Expected argument `embedding_bits` to be None, 4 or 8, but got {embedding_bits}.")
    if num_samples < 1:
        raise ValueError(f"Expected argument `num_samples` to be at least 1, but got {num_samples}.")
    if asymmetric and not true_sequential:
        raise ValueError(
            "Expected argument `asymmetric` to come with `true_sequential`, as it makes good what the layers before "
            "have lost, but got true_sequential=False."
        )


def _plan(
    layers: Mapping[str, nn.Module],
    held: Container[int],
    bits: int,
    group_size: int,
    bits_by_pattern: Mapping[str, int] | None,
    group_size_by_pattern: Mapping[str, int] | None,
) -> tuple[dict[str, tuple[int, int]], dict[str, LayerReport]]:
    """Bits and group size of each layer that the format can hold, and reports of those it cannot."""
    plan: dict[str, tuple[int, int]] = {}
    reports: dict[str, LayerReport] = {}
    for name, layer in layers.items():
        reason = why_not_replaceable(layer)
        if reason is None and id(layer.weight) in held:
            reason = "an embedding has the same weight"
        if reason is not None:
            reports[name] = _left(name, reason)
            continue
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
    return plan, reports


def _left(name: str, reason: str) -> LayerReport:
    return LayerReport(name, (0, 0), 0, 0, 0.0, 0.0, 0.0, f"left in floating point: {reason}")


def _report(name: str, result: QuantizedWeight, seconds: float, note: str) -> LayerReport:
    if result.scales.dtype == torch.float32:
        scales = "scales in float32, as float16 does not reach so far: other tools round them to float16"
        note = "; ".join(filter(None, [note, scales]))
    rows, width = result.codes.shape
    return LayerReport(
        name, (rows, width), result.bits, result.group_size, result.error, result.rounding_error, seconds, note
    )


def _smaller_group(name: str, result: QuantizedWeight, by_pattern: Mapping[str, int] | None, default: int) -> str:
    asked = _by_pattern(name, by_pattern, default)
    return "" if asked in (-1, result.group_size) else f"group {asked} does not divide {result.codes.shape[1]}"


def _quantize_together(
    layers: list[nn.Module], hessian: Tensor | None, drift: Tensor | None, bits: int, group_size: int, **options: Any
) -> list[QuantizedWeight]:
    # Rows of a weight do not know of each other: layers with the same input are one layer with more outputs.
    weights = [_weight(layer) for layer in layers]
    weight = torch.cat(weights)
    if hessian is not None and drift is not None:
        weight = retarget(weight, hessian, drift, options["damp_percent"])
    result = gptq_layer(weight, hessian, bits=bits, group_size=group_size, **options)
    stops = torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()
    return [result.rows(stop - len(weight), stop) for weight, stop in zip(weights, stops, strict=True)]


def _drift(inputs: list[Tensor], floats: list[Tensor]) -> Tensor | None:
    if [rows.shape for rows in inputs] != [rows.shape for rows in floats]:
        return None
    width, count = inputs[0].shape[-1], sum(map(len, inputs))
    drift = inputs[0].new_zeros(width, width, dtype=torch.float32)
    for rows, wanted in zip(inputs, floats, strict=True):
        drift.addmm_((wanted - rows).float().T, rows.float(), alpha=2 / count)
    return drift


def _inputs(
    model: nn.Module,
    twin: nn.Module | None,
    layers: dict[str, nn.Module],
    dataloader: Iterable[Any] | None,
    num_samples: int,
    forward: Forward,
) -> Iterator[tuple[list[str], list[Tensor], list[Tensor]]]:
    """Names and inputs of the layers in forward order, and the inputs that the float twin has there."""
    if dataloader is None or not layers:
        return
    weight = next(iter(layers.values())).weight
    assert isinstance(weight, Tensor)
    batches = first_batches(dataloader, num_samples, weight.device)
    if twin is None:
        for names, inputs in calibrate(model, layers, batches, forward):
            yield names, inputs, []
        return
    both = calibrate(twin, {name: twin.get_submodule(name) for name in layers}, batches, forward)
    floats: dict[str, list[Tensor]] = {}
    for names, inputs in calibrate(model, layers, batches, forward):
        # Same order in both, but for experts: what the twin met on the way waits until it is asked for, and it may
        # never meet one that is met here.
        while names[0] not in floats:
            met, rows = next(both, (names, []))
            floats.update(dict.fromkeys(met, rows))
        yield names, inputs, floats[names[0]]
        for name in names:
            floats.pop(name, None)


def _linear_layers(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """The linear layers by their first name, and every name that shares their weight."""
    layers: dict[str, nn.Module] = {}
    aliases: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, Conv1D)) and matches(name, include) and not matches(name, exclude):
            # A layer that shares its weight, or its all, with another one is quantised with it.
            shared = module.weight if why_not_replaceable(module) is None else module
            owner = first.setdefault(id(shared), name)
            aliases.setdefault(owner, []).append(name)
            layers.setdefault(owner, module)
    return layers, aliases


def _quantize_embeddings(model: nn.Module, bits: int) -> dict[str, str]:
    """Quantise the large ones in place; names of those that are left, and why."""
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    done: dict[int, QuantEmbedding] = {}
    left: dict[str, str] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Embedding) or module.embedding_dim * bits % 32 or module.num_embeddings < 256:
            continue
        reason = why_not_replaceable(module)
        if reason is not None:
            left[name] = reason
        elif id(module.weight) in tied:
            left[name] = "an output head shares its weight"
            warnings.warn(f"Embedding `{name}` stays in floating point: {left[name]}.", stacklevel=3)
        else:
            model.set_submodule(name, done.setdefault(id(module), QuantEmbedding.from_embedding(module, bits)))
    return left


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern of ``fnmatch`` fits a layer's whole name or one part of it between dots."""
    parts = (name, *name.split("."))
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in parts)


def _by_pattern(name: str, values: Mapping[str, int] | None, default: int) -> int:
    return next((value for pattern, value in (values or {}).items() if matches(name, (pattern,))), default)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def _bias(layer: nn.Module) -> Tensor | None:
    assert layer.bias is None or isinstance(layer.bias, Tensor)
    return layer.bias


def _shape(layer: nn.Module) -> tuple[int, int]:
    return len(_weight(layer)), _weight(layer).shape[1]
