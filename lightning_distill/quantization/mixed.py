"""Mixed precision: more bits for the layers that hurt the model's answer most, as measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.models.calling import call_model, logits_of
from lightning_distill.quantization.calibration import Forward, first_batches
from lightning_distill.quantization.linear import QuantLinear
from lightning_distill.quantization.plan import LayerReport


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    quantized: nn.Module,
    dataloader: Iterable[Any],
    *,
    num_samples: int = 64,
    forward: Forward = call_model,
) -> dict[str, float]:
    """How much each quantised layer alone changes the model's answer.

    One layer after the other takes its quantised weight in the float model, and the outputs are compared. Layers that
    were calibrated ``asymmetric``, to answer for those before them, say nothing alone.

    Args:
        model: The float model that was quantised; as it was, afterwards.
        quantized: What ``quantize`` made of it.
        dataloader: Batches to compare outputs on.
        num_samples: Rows of them to use.
        forward: Calls the model on a batch; gives logits, or an output that holds them.

    Returns:
        Per layer, the squared change of the logits relative to the logits themselves.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.quantization import quantize, sensitivity
        >>> _ = torch.manual_seed(0)
        >>> model, data = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), [torch.randn(64, 64)]
        >>> quantized, _ = quantize(model, data, group_size=32, bits_by_pattern={"2": 2})
        >>> found = sensitivity(model, quantized, data)
        >>> found["2"] > found["0"]
        True
    """
    layers = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, QuantLinear)}
    device = next(iter(layers.values())).qweight.device
    batches = first_batches(dataloader, num_samples, device)
    training = model.training
    model.eval()
    wanted = [_answers(model, batch, forward) for batch in batches]
    power = sum(float(answers.square().sum()) for answers in wanted)
    changes: dict[str, float] = {}
    try:
        for name, layer in layers.items():
            kept = model.get_submodule(name)
            model.set_submodule(name, layer)
            try:
                got = [_answers(model, batch, forward) for batch in batches]
            finally:
                model.set_submodule(name, kept)
            lost = sum(float((a - b).square().sum()) for a, b in zip(got, wanted, strict=True))
            changes[name] = lost / max(power, torch.finfo(torch.float32).tiny)
    finally:
        model.train(training)
    return changes


def most_sensitive(
    report: Sequence[LayerReport],
    changes: Mapping[str, float],
    *,
    bits: int = 8,
    count: int | None = None,
    budget_bytes: int | None = None,
) -> list[str]:
    """Choose the layers that gain most for the bytes that more bits cost.

    Args:
        report: What ``quantize`` gave.
        changes: What :func:`sensitivity` gave.
        bits: Bits they are to have; 0 for float32.
        count: At most so many.
        budget_bytes: Bytes that may be added in all.

    Returns:
        Names, the one that gains most first; layers that the budget has no room for are passed over.

    Example:
        >>> from lightning_distill.quantization import LayerReport, most_sensitive
        >>> report = [LayerReport(name, (64, 64), 4, 32, 0.01, 0.02, 0.1) for name in ("a", "b", "c")]
        >>> most_sensitive(report, {"a": 0.1, "b": 0.3, "c": 0.2}, budget_bytes=5_000)
        ['b', 'c']
    """
    costs = {
        layer.name: layer_bytes(layer, bits) - layer_bytes(layer, layer.bits)
        for layer in report
        if layer.name in changes and layer.bits and (bits == 0 or layer.bits < bits)
    }
    order = sorted(costs, key=lambda name: changes[name] / costs[name], reverse=True)
    chosen: list[str] = []
    for name in order[:count] if budget_bytes is None else order:
        if count is not None and len(chosen) == count:
            break
        if budget_bytes is None or costs[name] <= budget_bytes:
            chosen.append(name)
            budget_bytes = None if budget_bytes is None else budget_bytes - costs[name]
    return chosen


def layer_bytes(layer: LayerReport, bits: int) -> int:
    """Bytes of a layer's weight, grid and order in a checkpoint; with 0 bits, of its float32 weight."""
    rows, width = layer.shape
    if bits == 0:
        return 4 * rows * width
    groups = -(-width // layer.group_size)
    return rows * width * bits // 8 + groups * rows * bits // 8 + 2 * groups * rows + 4 * width


def _answers(model: nn.Module, batch: Any, forward: Forward) -> Tensor:
    logits = logits_of(forward(model, batch)).float()
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    # A row of logits per token: those of padding are nobody's answer.
    return logits if mask is None or logits.shape[:-1] != mask.shape else logits[mask.bool()]
