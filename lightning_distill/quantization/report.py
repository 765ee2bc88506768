"""What quantising a model cost, for people to read."""

import math
from collections.abc import Sequence
from pathlib import Path

from lightning_distill.quantization.plan import LayerReport


def table(report: Sequence[LayerReport]) -> str:
    """A line for each layer: shape, bits, errors, time and what was done otherwise than asked."""
    return "\n".join(
        f"{layer.name:<50} {layer.shape!s:<14} {layer.bits} bit  error {layer.error:8.3%}  rounding "
        f"{layer.rounding_error:8.3%}  {layer.seconds:5.2f} s  {layer.note}"
        for layer in report
    )


def plot(report: Sequence[LayerReport], path: Path) -> None:
    """Draw the errors of the layers, rounded and by GPTQ, into a file."""
    from matplotlib.figure import Figure  # only here: importing it costs every process that quantises nothing

    rows = [layer for layer in report if layer.bits]
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    errors = [[100 * layer.rounding_error for layer in rows], [100 * layer.error for layer in rows]]
    for values, color, label in zip(errors, ("#b0b0b0", "#1f5fa8"), ("rounding", "GPTQ"), strict=True):
        axes.plot(values, places, "o", color=color, label=label)
    axes.set_yticks(places, [layer.name for layer in rows], fontsize=7)
    axes.invert_yaxis()
    if any(0 < value < math.inf for values in errors for value in values):  # weights that round exactly have no error
        axes.set_xscale("log")
    axes.set_xlabel("relative squared error of the layer's output (%)")
    axes.legend()
    figure.savefig(path, dpi=120)
