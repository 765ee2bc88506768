"""The picture of a calibration."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_distill.early_exit.calibration import Calibration


def plot_calibration(report: "Calibration", path: Path) -> None:
    """Draw accuracy against mean depth with the chosen point, and what each exit is worth.

    Args:
        report: What :func:`lightning_distill.early_exit.calibrate` returned.
        path: The picture, a PNG.
    """
    # The canvas is made by hand: pyplot would ask for a display and keep the figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    frontier, accuracy, share, error = figure.subplots(2, 2).ravel()
    promise = report.guarantee

    depths, scores = zip(*report.frontier, strict=True)
    frontier.plot(depths, scores, marker=".", color="C0", label="threshold sets")
    frontier.plot(report.mean_depth, report.metric_early, "*", color="C3", markersize=15, label="chosen")
    frontier.axhline(report.metric_full, color="0.4", linestyle="--", linewidth=1, label="all layers")
    floor = report.metric_full - promise["max_drop"]
    frontier.axhline(floor, color="C3", linestyle=":", linewidth=1, label=f"at most {promise['max_drop']:g} lost")
    kept = "promised" if promise["holds"] else "not promised"
    frontier.set(
        title=f"Accuracy and depth ({kept} at {promise['confidence']:g}, {promise['rows']} rows)",
        xlabel="mean number of layers run",
        ylabel="accuracy",
        ylim=(min(floor, report.metric_early) - 0.05, max(scores) + 0.01),
    )
    frontier.legend(fontsize=8, frameon=False)

    layers = [str(layer) for layer in report.accuracy]
    accuracy.bar(layers, report.accuracy.values(), color=["C0"] * (len(layers) - 1) + ["0.5"])
    low = min(report.accuracy.values())
    accuracy.set(title="Accuracy of each exit on all rows", xlabel="layer", ylim=(max(0.0, low - 0.05), 1.0))
    share.bar(layers, [100 * value for value in report.exit_share.values()], color=["C0"] * (len(layers) - 1) + ["0.5"])
    share.set(title="Rows that leave at each exit (%)", xlabel="layer")
    places = range(len(report.calibration_error))
    for offset, name, index in ((-0.2, "before", 0), (0.2, "after", 1)):
        values = [pair[index] for pair in report.calibration_error.values()]
        error.bar([place + offset for place in places], values, width=0.4, label=f"{name} temperature scaling")
    error.set_xticks(list(places), [str(layer) for layer in report.calibration_error])
    error.set(title="Expected calibration error of each ramp", xlabel="layer")
    error.legend(fontsize=8, frameon=False)
    for axes in (frontier, accuracy, share, error):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
