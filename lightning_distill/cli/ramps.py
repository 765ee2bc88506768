"""What the recipe of early exit needs that teaches nothing: checks of its flags, what ramps cost and save."""

from dataclasses import asdict
from typing import Any

import lightning as L

from lightning_distill.arguments import between
from lightning_distill.cli.parser import Flags
from lightning_distill.cli.screen import say, shows_progress
from lightning_distill.cli.task import metric_of, test_batches
from lightning_distill.early_exit import EarlyExitModel
from lightning_distill.early_exit.ramps import resolve_exits
from lightning_distill.measure import throughput
from lightning_distill.tasks import TASKS


def check_ramps(flags: Flags, data: Any, *models: Any) -> None:
    """Refuse data that cannot choose thresholds, and exits that a model does not have.

    Raises:
        ValueError: If it is so.
    """
    if flags.metric is not None:
        raise ValueError("--metric: what early exit costs is measured by the task's own metric; leave it out")
    if not TASKS[data.task].has_classes:
        raise ValueError("--data.*: early exit by confidence needs classes, and these labels are numbers")
    between("--model.max_drop", flags.model.max_drop, 0, 1)
    if len({label for _, label in data.rows("val")}) < 2:
        raise ValueError(
            "--data.val_file: thresholds are chosen on validation rows of at least two classes, and these have one"
        )
    for model in models:
        resolve_exits(flags.model.exits, model.config.num_hidden_layers)


def begin_ramps(flags: Flags, name: str) -> None:
    """Say whose ramps are trained, and seed everything; see :func:`lightning_distill.cli.begin_training`."""
    say(f"\nTraining ramps of the {name}, for {flags.model.ramp_epochs} epochs")
    L.seed_everything(flags.seed, workers=True, verbose=False)


def measure_ramps(
    flags: Flags, data: Any, early: EarlyExitModel, full: Any, report: Any, scores: dict[str, float]
) -> dict[str, Any]:
    """What early exit costs and saves on the test rows, for ``summary.json``.

    ``early`` is ``full`` with its thresholds, ``report`` that of their calibration, and ``scores`` what the test of the
    model that had no ramps yet has logged.
    """
    device, metric = full.device, metric_of(flags, data)
    tester = L.Trainer(
        accelerator="cpu" if device.type == "cpu" else "auto", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_test_batches=flags.trainer.limit_test_batches,
    )  # fmt: skip
    (tested,) = tester.test(early, datamodule=data, verbose=False)
    ratios = {}
    for size, batches in test_batches(flags, data).items():
        rates = throughput({"full": full, "early": early}, batches, device=device, progress=shows_progress(flags))
        ratios[f"throughput_ratio_batch{size}"] = round(rates["early"] / rates["full"], 4)
    before, after = scores[f"test_{metric}"], tested[f"test_{metric}"]
    return {
        "metric_full": before,
        "metric_early": after,
        "metric_drop": before - after,
        "mean_depth": tested["test_mean_depth"],
        **ratios,
        "guarantee": asdict(report)["guarantee"],
    }
