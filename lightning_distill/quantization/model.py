"""Quantise a whole model, layer after layer in forward order."""

import copy
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.arguments import typed
from lightning_distill.models.calling import call_model
from lightning_distill.quantization.calibration import Forward, calibrate, first_batches
from lightning_distill.quantization.experts import separate_experts
from lightning_distill.quantization.finished import FinishedLayers
from lightning_distill.quantization.gptq import QuantizedWeight, gptq_layer, retarget
from lightning_distill.quantization.hessian import Hessian
from lightning_distill.quantization.linear import QuantEmbedding, QuantLinear
from lightning_distill.quantization.plan import (
    EXCLUDE,
    LayerReport,
    Plan,
    bias_of,
    check_options,
    left,
    plan,
    weight_of,
)
from lightning_distill.quantization.replaceable import copied, why_not_replaceable


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
    check_options(
        bits, group_size, embedding_bits, bits_by_pattern, group_size_by_pattern, num_samples, damp_percent,
        true_sequential, asymmetric,
    )  # fmt: skip
    if asymmetric is None:
        asymmetric = bits == 2 and true_sequential and dataloader is not None
    if asymmetric and dataloader is None:
        raise ValueError("Expected argument `asymmetric` to come with calibration data, but got dataloader=None.")
    already = any(isinstance(module, (QuantLinear, QuantEmbedding)) for module in model.modules())
    if already or getattr(getattr(model, "config", None), "quantization_config", None):
        raise ValueError("Expected argument `model` to be in floating point, but it is quantised already.")

    model = copied(model)
    unknown = separate_experts(model)
    planned = plan(model, include, exclude, bits, group_size, bits_by_pattern or {}, group_size_by_pattern or {})
    options: dict[str, Any] = {
        "sym": sym, "desc_act": desc_act, "static_groups": static_groups, "mse": mse, "damp_percent": damp_percent
    }  # fmt: skip
    asked = [planned.settings, options, num_samples, dataloader is None, true_sequential, asymmetric]
    finished = FinishedLayers(resume, asked, [weight_of(planned.layers[name]) for name in planned.settings])
    twin = copy.deepcopy(model) if asymmetric else None
    work = _Work(model, planned, options, finished, true_sequential, on_layer)
    work.take_finished()
    for names, inputs, floats in _inputs(model, twin, work.rest(), dataloader, num_samples, forward):
        work.quantize(names, inputs, floats)
    # No token came to the others: layers that are not called, or experts that nobody was routed to.
    work.round("rounded to nearest: no calibration input reached it" if dataloader is not None else "")
    work.put_in_place()
    embeddings = {} if embedding_bits is None else _quantize_embeddings(model, embedding_bits)
    reports = work.reports | {name: left(name, note) for name, note in (unknown | embeddings).items()}
    return model, [reports[name] for name in (*planned.layers, *unknown, *embeddings)]


@dataclass
class _Work:
    """A copy of a model whose layers are quantised one after the other, and the reports of those that are done."""

    model: nn.Module
    plan: Plan
    options: dict[str, Any]
    finished: FinishedLayers
    true_sequential: bool
    on_layer: Callable[[LayerReport, int], None] | None
    packed: dict[str, QuantLinear] = field(default_factory=dict)
    reports: dict[str, LayerReport] = field(init=False)
    short: list[str] = field(default_factory=list)  # layers that fewer tokens reached than they have inputs

    def __post_init__(self) -> None:
        self.reports = dict(self.plan.left)

    def rest(self) -> dict[str, nn.Module]:
        """The layers that are still to do."""
        return {name: self.plan.layers[name] for name in self.plan.settings if name not in self.packed}

    def take_finished(self) -> None:
        """Layers that an earlier call was done with."""
        for name, layer in self.rest().items():
            kept = self.finished.load(name)
            if kept is not None:
                self._finish(name, kept[0].to(weight_of(layer).device), LayerReport(**kept[1]))

    def quantize(self, names: list[str], inputs: list[Tensor], floats: list[Tensor] | None) -> None:
        """Layers with the same inputs; ``floats`` are those of the float model, for asymmetric calibration."""
        hessian, note = self._hessian(names, inputs)
        drift = None
        if hessian is not None and floats is not None:
            drift = _drift(inputs, floats)
            note = "" if drift is not None else "not asymmetric: other tokens than in the float model reached it"
        for setting in sorted({self.plan.settings[name] for name in names}):
            together = [name for name in names if self.plan.settings[name] == setting]
            started = time.perf_counter()
            results = self._quantize_together(together, hessian, drift)
            seconds = time.perf_counter() - started
            outputs = sum(len(result.codes) for result in results)
            for name, result in zip(together, results, strict=True):
                said = [note, self.plan.notes.get(name, "")]
                if hessian is not None and result.damp_percent > self.options["damp_percent"]:
                    said.append(f"damping raised to {result.damp_percent:g}")
                layer = QuantLinear.from_weight(result, bias_of(self.plan.layers[name]))
                report = _report(name, result, seconds * len(result.codes) / outputs, said)
                self.finished.save(name, layer, asdict(report))
                self._finish(name, layer, report)

    def _hessian(self, names: list[str], inputs: list[Tensor]) -> tuple[Tensor | None, str]:
        """The Hessian of inputs, or why there is none to go by."""
        hessian = Hessian(inputs[0].shape[-1], inputs[0].device)
        for rows in inputs:
            if not bool(rows.isfinite().all()):
                raise ValueError(f"Expected finite inputs of layer `{names[0]}`, but got NaN or infinite values.")
            hessian.update(rows)
        matrix = hessian.matrix()
        if not bool(matrix.any()):
            return None, "rounded to nearest: every calibration input is zero"
        if hessian.count < len(matrix):
            if "experts" in names[0].split("."):
                return None, f"rounded to nearest: {hessian.count} tokens reached it, {len(matrix)} are needed"
            self.short += [f"{name}: {hessian.count} of {len(matrix)}" for name in names]
        return matrix, ""

    def _quantize_together(
        self, names: list[str], hessian: Tensor | None, drift: Tensor | None
    ) -> list[QuantizedWeight]:
        # Rows of a weight do not know of each other: layers with the same input are one layer with more outputs.
        weights = [weight_of(self.plan.layers[name]) for name in names]
        weight = torch.cat(weights)
        if hessian is not None and drift is not None:
            weight = retarget(weight, hessian, drift, self.options["damp_percent"])
        bits, group_size = self.plan.settings[names[0]]
        result = gptq_layer(weight, hessian, bits=bits, group_size=group_size, **self.options)
        stops = torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()
        return [result.rows(stop - len(weight), stop) for weight, stop in zip(weights, stops, strict=True)]

    def round(self, note: str) -> None:
        """Round the layers that are still to do to nearest."""
        for name, layer in self.rest().items():
            (result,) = self._quantize_together([name], None, None)
            self._finish(name, QuantLinear.from_weight(result, bias_of(layer)), _report(name, result, 0.0, [note]))

    def _finish(self, name: str, layer: QuantLinear, report: LayerReport) -> None:
        self.packed[name], self.reports[name] = layer, report
        layer.take_place_of(self.plan.layers[name])
        if self.true_sequential:
            # Suspended forwards still hold the float layer: give it the quantised values until the walk is over. In
            # memory of its own: another module may hold the same tensor, or a part of it.
            dense = layer.dequantize().to(layer.dtype)
            weight = nn.Parameter(dense.T if layer.transposed else dense, requires_grad=False)
            for alias in self.plan.aliases[name]:
                self.model.get_submodule(alias).weight = weight
        if self.on_layer is not None:
            self.on_layer(report, len(self.plan.settings))

    def put_in_place(self) -> None:
        """Have the model hold the quantised layers."""
        if self.short:
            warnings.warn(
                "Expected at least as many calibration tokens as a layer has inputs, but got fewer, so that the rank "
                f"of H is at most: {'; '.join(self.short[:3])}{' ...' if len(self.short) > 3 else ''}. Damping fills "
                "the rest; raise `num_samples`.",
                stacklevel=3,
            )
        for name, layer in self.packed.items():
            for alias in self.plan.aliases[name]:
                self.model.set_submodule(alias, layer.beside(self.model.get_submodule(alias)))


def _report(name: str, result: QuantizedWeight, seconds: float, notes: list[str]) -> LayerReport:
    if result.scales.dtype == torch.float32:
        notes = [*notes, "scales in float32, as float16 does not reach so far: other tools round them to float16"]
    rows, width = result.codes.shape
    errors, note = (result.error, result.rounding_error), "; ".join(filter(None, notes))
    return LayerReport(name, (rows, width), result.bits, result.group_size, *errors, seconds, note)


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
) -> Iterator[tuple[list[str], list[Tensor], list[Tensor] | None]]:
    """Names and inputs of the layers in forward order, and the inputs that the float twin has there."""
    if dataloader is None or not layers:
        return
    weight = next(iter(layers.values())).weight
    assert isinstance(weight, Tensor)
    batches = first_batches(dataloader, num_samples, weight.device)
    if twin is None:
        for names, inputs in calibrate(model, layers, batches, forward):
            yield names, inputs, None
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
