"""What the recipe of any task needs that teaches nothing: its metric, the batches it is timed on, rows of a report."""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import default_collate
from torchmetrics import Metric

from lightning_distill.cli.parser import Flags
from lightning_distill.cli.report import Column, write_report
from lightning_distill.models.batch import IGNORE_INDEX
from lightning_distill.tasks import TASKS
from lightning_distill.tasks.named_metrics import named_metrics


def metric_of(flags: Flags, data: Any) -> str:
    """Name of the metric that decides: the first of ``--metric``, or the task's own."""
    if flags.get("metric"):
        return next(iter(metrics_of(flags, data) or {}))
    name, _ = TASKS[data.task].metric()
    return name


def metrics_of(flags: Flags, data: Any) -> dict[str, Metric] | None:
    """The metrics of ``--metric`` by name, made for the data; None for the task's own.

    Raises:
        ValueError: If the task has no such metric.
    """
    asked = flags.get("metric")
    return named_metrics(asked, data.task, data.num_labels) if asked else None


def monitor_of(flags: Flags, data: Any) -> str:
    """The validation metric that says which epoch is best."""
    return f"val_{metric_of(flags, data)}"


def test_batches(flags: Flags, data: Any) -> dict[int, list[Any]]:
    """Batches of test rows by their size, in the order of the file: 64 of one row, 8 of 32 rows.

    A trial run that tests on a few batches gets as few.
    """
    rows, collate = data.predict_dataloader().dataset, data.collate or default_collate
    limit = flags.trainer.limit_test_batches
    found = {}
    for size, count in ((1, 64), (32, 8)):
        count = min(count, limit) if isinstance(limit, int) and limit > 0 else count
        groups = [range(i, min(i + size, len(rows))) for i in range(0, len(rows), size)][:count]
        found[size] = [collate([rows[row] for row in group]) for group in groups]
    return found


def report_task(
    flags: Flags,
    data: Any,
    models: Mapping[str, nn.Module],
    scores: Mapping[str, Mapping[str, float]],
    latency: Mapping[int, Mapping[str, float]],
    *,
    seconds: float,
    **more: Any,
) -> None:
    """Print the table, write ``summary.json`` and ``curves.png``; see ``write_report``.

    ``latency`` is the milliseconds of each model by the size of the batch, 1 and 32. A student in few bits, called
    ``student-gptq``, has a line of its own.
    """
    metric, task = metric_of(flags, data), TASKS[data.task]
    rows = {
        name: {
            "metric_name": metric,
            "metric": scores[name][f"test_{metric}"],
            "agreement": scores[name].get("test_agreement", 1.0),
            "latency_ms_batch1": latency[1][name],
            "latency_ms_batch32": latency[32][name],
        }
        for name in models
        if name != "student-gptq"
    }
    columns = [
        Column("parameters", "parameters", "{:.2f} M", 1e-6),
        Column("on disk", "bytes", "{:.1f} MB", 1e-6),
        Column(f"{metric} (test)", "metric", "{:.4f}", name="metric_retained"),
        Column("agreement", "agreement", "{:.4f}", name=None),
        Column("batch 1", "latency_ms_batch1", "{:.2f} ms", name="latency_batch1"),
        Column("batch 32", "latency_ms_batch32", "{:.1f} ms", name="latency_batch32"),
    ]
    if "student-gptq" in models:
        written = json.loads((flags.output_dir / "student-gptq" / "gptq.json").read_text())
        more["gptq"] = {
            **{key: written[key] for key in ("bits", "group_size", "bytes")},
            "metric": scores["student-gptq"][f"test_{metric}"],
            "metric_before": scores["student"][f"test_{metric}"],
            "seconds": round(written["seconds"], 1),
            "latency_ms_batch1": latency[1]["student-gptq"],
        }
    tested = data.predict_dataloader().dataset
    available = sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in tested) if task.of_tokens else len(tested)
    write_report(
        flags, models, scores, rows, columns, metric=metric, what="tokens" if task.of_tokens else "rows",
        available=available, seconds=seconds, **more,
    )  # fmt: skip
    if "gptq" in more:
        print(f"\nThe student in {flags.gptq.bits} bits: {json.dumps(more['gptq'])}")
    for name, key in (("teacher", "early_exit"), ("student", "early_exit_student")):
        if (row := more.get(key)) is not None:
            print(
                f"Early exit of the {name}: {row['mean_depth']:.2f} layers on average, {metric} "
                f"{row['metric_full']:.4f} -> {row['metric_early']:.4f}, throughput "
                f"x {row['throughput_ratio_batch1']:.2f} (batch 1), x {row['throughput_ratio_batch32']:.2f} (batch 32)"
            )
