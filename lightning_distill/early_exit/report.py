"""What a calibration found: a record, a file and a picture."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_distill.early_exit.inference import EarlyExitInference
from lightning_distill.models.folders import writing


@dataclass
class Calibration:
    """What :func:`lightning_distill.early_exit.calibrate` found, on the rows that the promise was tested on.

    Attributes:
        thresholds: By exit layer; empty where nothing may leave.
        temperatures: By exit layer.
        metric_full: Accuracy of the full model (agreement with itself, so 1, without labels).
        metric_early: Accuracy with early exits.
        mean_depth: Mean number of layers run.
        depth: Number of layers.
        exit_share: Share of rows that leave at each exit layer; the last layer's is the rest.
        accuracy: Accuracy of each ramp on all rows, and of the full model.
        calibration_error: Expected calibration error of each ramp before and after the temperature, 15 bins.
        frontier: ``[mean depth, accuracy]`` along the path of threshold sets.
        guarantee: What is promised: ``max_drop``, ``confidence``, ``holds``, ``p_value``, ``rows`` it was tested on,
            ``rows_needed`` of calibration data where it does not hold (None: no number is enough), ``method``.
    """

    thresholds: dict[int, float]
    temperatures: dict[int, float]
    metric_full: float
    metric_early: float
    mean_depth: float
    depth: int
    exit_share: dict[int, float]
    accuracy: dict[int, float]
    calibration_error: dict[int, tuple[float, float]]
    frontier: list[tuple[float, float]] = field(default_factory=list)
    guarantee: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON's types, with strings as keys."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    def write(self, model: EarlyExitInference, folder: str | os.PathLike[str]) -> None:
        """Write the model's ramps, ``early_exit.json`` (with this report) and ``early_exit.png``.

        Args:
            model: The calibrated model.
            folder: Where to write: a new folder, or one that was written here, whose other files stay.

        Raises:
            ValueError: If the folder holds anything else.
        """
        with writing(folder, keep=True) as draft:
            model.ramps.save(draft, **model.settings(), calibration=self.as_dict())
            self.plot(draft / "early_exit.png")

    def plot(self, path: Path) -> None:
        """Draw accuracy against mean depth with the chosen point, and what each exit is worth, as a PNG."""
        # The canvas is made by hand: pyplot would ask for a display and keep the figure alive.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 7), layout="constrained")
        FigureCanvasAgg(figure)
        frontier, accuracy, share, error = figure.subplots(2, 2).ravel()
        self._plot_frontier(frontier)
        layers, colors = [str(layer) for layer in self.accuracy], ["C0"] * (len(self.accuracy) - 1) + ["0.5"]
        accuracy.bar(layers, self.accuracy.values(), color=colors)
        low = min(self.accuracy.values())
        accuracy.set(title="Accuracy of each exit on all rows", xlabel="layer", ylim=(max(0.0, low - 0.05), 1.0))
        share.bar(layers, [100 * value for value in self.exit_share.values()], color=colors)
        share.set(title="Rows that leave at each exit (%)", xlabel="layer")
        places = range(len(self.calibration_error))
        for offset, name, index in ((-0.2, "before", 0), (0.2, "after", 1)):
            values = [pair[index] for pair in self.calibration_error.values()]
            error.bar([place + offset for place in places], values, width=0.4, label=f"{name} temperature scaling")
        error.set_xticks(list(places), [str(layer) for layer in self.calibration_error])
        error.set(title="Expected calibration error of each ramp", xlabel="layer")
        error.legend(fontsize=8, frameon=False)
        for axes in (frontier, accuracy, share, error):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=110)

    def _plot_frontier(self, axes: Any) -> None:
        promise, (depths, scores) = self.guarantee, zip(*self.frontier, strict=True)
        floor = self.metric_full - promise["max_drop"]
        axes.plot(depths, scores, marker=".", color="C0", label="threshold sets")
        axes.plot(self.mean_depth, self.metric_early, "*", color="C3", markersize=15, label="chosen")
        axes.axhline(self.metric_full, color="0.4", linestyle="--", linewidth=1, label="all layers")
        axes.axhline(floor, color="C3", linestyle=":", linewidth=1, label=f"at most {promise['max_drop']:g} lost")
        kept = "promised" if promise["holds"] else "not promised"
        axes.set(
            title=f"Accuracy and depth ({kept} at {promise['confidence']:g}, {promise['rows']} rows)",
            xlabel="mean number of layers run",
            ylabel="accuracy",
            ylim=(min(floor, self.metric_early) - 0.05, max(scores) + 0.01),
        )
        axes.legend(fontsize=8, frameon=False)
