"""What a recipe leaves behind: a table on the screen, summary.json, curves.png."""

import csv
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_distill.cli.evidence import CONFIDENCE, Outcome, remarks
from lightning_distill.cli.parser import Flags
from lightning_distill.cli.run_folder import end_run
from lightning_distill.measure import count_bytes, count_parameters

#: Steps and values by metric.
Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]

_VERSIONED = ("lightning-distill", "torch", "lightning", "transformers", "torchmetrics")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _VERSIONED}}


class Column(NamedTuple):
    """What one column of a report shows of each model.

    Attributes:
        title: What stands above it.
        key: The key in the model's row.
        form: How a number is written.
        scale: Factor of the number before it is written.
        name: What the ratio of student to teacher is called in ``summary.json``; empty: as the key; None: it has none.
    """

    title: str
    key: str
    form: str
    scale: float = 1.0
    name: str | None = ""


def write_report(
    flags: Flags,
    models: Mapping[str, nn.Module],
    scores: Mapping[str, Mapping[str, float]],
    rows: Mapping[str, Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    metric: str,
    what: str,
    available: int,
    seconds: float,
    **more: Any,
) -> None:
    """Print the table, write ``summary.json`` and ``curves.png``, and end the run; called on rank 0.

    Args:
        flags: The parsed flags.
        models: The models by name.
        scores: What the test of each has logged.
        rows: What else was measured of each.
        columns: What the table shows of it.
        metric: Name of the metric that decides.
        what: What the models were tested on: rows or tokens.
        available: How many of these the test data have, of which ``--trainer.limit_test_batches`` may take a part.
        seconds: How long the run took.
        **more: What else ``summary.json`` holds.
    """
    output_dir = flags.output_dir
    sizes = {name: {"parameters": count_parameters(models[name]), "bytes": count_bytes(models[name])} for name in rows}
    rows = {name: {**sizes[name], **row} for name, row in rows.items()}
    tested = {name: Outcome.of(scores[name], metric) for name in rows}
    items = tested["student"].items
    intervals = {name: test.interval for name, test in tested.items()}
    one_answer = [name for name, test in tested.items() if test.one_answer]
    summary = rows | {
        "ratios": ratios(rows["student"], rows["teacher"], columns),
        "tested": {
            "items": items,
            "available": available,
            "intervals": intervals,  # Wilson's, of accuracies; other metrics have none
            "confidence": CONFIDENCE,
            "one_answer": one_answer,
        },
        "versions": versions(),
        "seed": flags.seed,
        "seconds": round(seconds, 1),
        **more,
    }
    write_summary(output_dir / "summary.json", summary)
    curves = {name: read_curves(output_dir / "logs" / name / "metrics.csv") for name in flags.trainings}
    panels = {
        "training loss": ["train_loss"],
        f"validation {metric}": [f"val_{metric}"],
        "agreement": ["val_agreement"],
    }
    plot_curves(output_dir / "curves.png", curves, panels=panels)
    part = f"{items}" if items == available else f"{items} of {available}"
    title = f"{part} test {what}, seed {flags.seed}, {seconds:.0f} s"
    print()
    print_table(rows, columns, reference="teacher", title=title, intervals=intervals, meaningless=one_answer)
    for remark in remarks(tested, {name: row.get("metric") for name, row in rows.items()}, metric):
        print(remark)
    print(f"\nThe student is in {output_dir / 'student'}, the numbers are in {output_dir / 'summary.json'}.")
    end_run(flags)


def ratio(student: float | None, teacher: float | None) -> float | None:
    """Student / teacher; None where that means nothing: the teacher's number is 0 or below, or one is not finite.

    Args:
        student: The student's number.
        teacher: The teacher's.

    Example:
        >>> from lightning_distill.cli.report import ratio
        >>> ratio(0.5, 2.0), ratio(0.5, 0.0), ratio(float("nan"), 1.0)
        (0.25, None, None)
    """
    if student is None or teacher is None or not (math.isfinite(student) and math.isfinite(teacher)) or teacher <= 0:
        return None
    return student / teacher


def ratios(
    student: Mapping[str, Any], teacher: Mapping[str, Any], columns: Sequence[Column]
) -> dict[str, float | None]:
    """How the student stands to the teacher: each ratio is student / teacher.

    Args:
        student: A row of ``summary.json``.
        teacher: The teacher's row.
        columns: Which of its numbers.

    Returns:
        The ratios by the names of the columns that have one; None where a ratio means nothing, see :func:`ratio`.

    Example:
        >>> from lightning_distill.cli.report import Column, ratios
        >>> columns = [Column("size", "bytes", "{}"), Column("accuracy", "metric", "{}", name="metric_retained")]
        >>> ratios({"bytes": 10, "metric": 0.81}, {"bytes": 40, "metric": 0.9}, columns)
        {'bytes': 0.25, 'metric_retained': 0.9}
    """
    found = {
        column.name or column.key: ratio(student[column.key], teacher[column.key])
        for column in columns
        if column.name is not None
    }
    return {name: None if value is None else round(value, 4) for name, value in found.items()}


def print_table(
    rows: Mapping[str, Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    reference: str,
    title: str,
    intervals: Mapping[str, Sequence[float] | None] | None = None,
    meaningless: Iterable[str] = (),
) -> None:
    """Print models side by side, each with its ratio to one of them.

    Args:
        rows: A row of ``summary.json`` by the name of its model.
        columns: What is shown of each.
        reference: The name of the model that the ratios are to.
        title: What stands above the table.
        intervals: By model, between what its ``metric`` is; shown beside it.
        meaningless: Models that give one answer to all rows: ratios of their ``metric`` and ``agreement`` are left out.
    """
    intervals, meaningless = intervals or {}, set(meaningless)
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for model, row in rows.items():
        numbers = []
        for column in columns:
            value, interval = row[column.key], intervals.get(model) if column.key == "metric" else None
            shown = "-" if value is None else column.form.format(value * column.scale)
            numbers.append(shown if interval is None else f"{shown} ({interval[0]:.3f} to {interval[1]:.3f})")
        table.add_row(model.replace("_", " "), *numbers)
    base = rows[reference]
    for model, row in rows.items():
        if model != reference:
            shares = []
            for column in columns:
                empty = column.key in ("metric", "agreement") and bool(meaningless & {model, reference})
                share = None if empty else ratio(row[column.key], base[column.key])
                shares.append("-" if share is None else f"{share:.3f}")
            table.add_row(f"{model.replace('_', ' ')} / {reference}", *shares, style="dim")
    # A log file or a pipe has no width of its own, and a wrapped number cannot be read.
    console = Console()
    Console(width=max(console.width, 140)).print(table)


def write_summary(path: str | os.PathLike[str], summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` whole or not at all.

    Args:
        path: The file.
        summary: What goes into it; primitives only. NaN and infinity, which JSON does not have, become null.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(_json(summary), indent=2, allow_nan=False) + "\n")
    draft.replace(path)


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class CurvesLogger(CSVLogger):
    """Writes ``<root>/<name>/metrics.csv``; a resumed run goes on in the file, where Lightning's begins it anew.

    What a cut run logged after the checkpoint it resumes from is logged again: :func:`read_curves` takes the later.

    Args:
        root: The folder.
        name: The folder in it.
        keep: Whether the rows that are there stay.
    """

    def __init__(self, root: str | os.PathLike[str], name: str, *, keep: bool = False) -> None:
        super().__init__(os.fspath(root), name=name, version="")
        self._keep = keep

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made at the first use, with the rows that stay."""
        if self._experiment is None:
            file = Path(self.log_dir) / "metrics.csv"
            rows = []
            if self._keep and file.is_file():
                with file.open(newline="") as stream:
                    rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(stream)]
            super().experiment.metrics.extend(rows)
        return self._experiment


def read_curves(metrics_file: str | os.PathLike[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each metric in the ``metrics.csv`` of Lightning's CSVLogger, the later row of a step.

    Args:
        metrics_file: The file.

    Returns:
        ``(steps, values)`` by metric; a metric that was never logged has no entry.
    """
    found: dict[str, dict[int, float]] = {}
    if not Path(metrics_file).exists():  # a run too short to log anything
        return {}
    with Path(metrics_file).open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    found.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in found.items()}


def plot_curves(
    path: str | os.PathLike[str],
    runs: Mapping[str, Curves],
    *,
    panels: Mapping[str, Iterable[str]],
    lines: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Draw metrics of several runs over their steps.

    Args:
        path: The picture, a PNG.
        runs: Curves of :func:`read_curves` by the name of the run.
        panels: The metrics of each panel, by the panel's title; metrics that a run does not have are left out.
        lines: Horizontal lines (a name and a value each) by the title of their panel.
    """
    # The canvas is made by hand: pyplot would ask for a display and keep the figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (title, metrics) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for metric in metrics:
            for number, (run, curves) in enumerate(runs.items()):
                if metric in curves:
                    steps, values = curves[metric]
                    marker = "o" if len(steps) < 12 else None
                    style: dict[str, Any] = {"color": f"C{number}", "marker": marker, "markersize": 4, "linewidth": 1.4}
                    # An axis has no place for infinity, nor matplotlib ticks for numbers near float64's end.
                    values = [value if abs(value) < 1e100 else math.nan for value in values]
                    axes.plot(steps, values, label=f"{run}: {metric}", **style)
        for name, value in (lines or {}).get(title, {}).items():
            place = value if abs(value) < 1e100 else math.nan
            axes.axhline(place, linestyle="--", linewidth=1, color="0.4", label=f"{name}: {value:.4g}")
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
