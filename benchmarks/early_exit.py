"""Early exit on SST-2 with a 6-layer MiniLM: accuracy and throughput against the full model and against simpler exits.

python benchmarks/early_exit.py                 # trains ramps (minutes), prints the table, writes runs/early_exit/
python benchmarks/early_exit.py --ramps runs/early_exit    # uses ramps that are there

"before" is the model as it came, "full" the one with ramps, whose layers have learned with them. All take turns on the
same batches of the test file in one process; a batch's time is the median over the rounds.
"Like" DeeBERT and PABEE means their rule with the same ramps: one entropy threshold and batch 1; patience, and a batch
leaves when all of its rows would. Static truncation is the student up to a layer with that layer's ramp as its head.
"""

import argparse
import copy
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_distill import DistillationModule
from lightning_distill.callbacks import EarlyExit
from lightning_distill.data import TextClassificationData
from lightning_distill.early_exit import Confidence, EarlyExitModel, Entropy, Patience
from lightning_distill.measure import throughput
from lightning_distill.models.calling import call_model
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.objectives import SoftTarget

SHARED = Path(__file__).resolve().parents[2] / "shared"
BATCHES = {1: 150, 8: 30, 32: 15}  # batches timed, by size


class WholeBatchPatience(Patience):
    """PABEE's rule in a batch: nobody leaves before everybody would."""

    def sure(self, measure: Tensor, threshold: float) -> Tensor:
        sure = super().sure(measure, threshold)
        return sure.all().expand_as(sure)


def train_ramps(student: Any, data: TextClassificationData, arguments: argparse.Namespace) -> None:
    """All layers learn what the student said before it had ramps ("joint"), or the ramps alone what it says now."""
    joint = arguments.training == "joint"
    module = DistillationModule(
        copy.deepcopy(student) if joint else None, student, [SoftTarget(temperature=2.0)] if joint else None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 5e-5, weight_decay=0.01),
        lr_scheduler=lambda optimizer: {
            "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, arguments.steps), "interval": "step",
        },
    )  # fmt: skip
    learned: Any = {"teacher_weight": 1.0, "temperature": 2.0} if joint else {}
    L.Trainer(
        max_steps=arguments.steps,
        precision=arguments.precision,
        callbacks=[EarlyExit(arguments.ramps_behind, training=arguments.training, lr=1e-3, **learned)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accelerator="cpu",
        use_distributed_sampler=False,
    ).fit(module, datamodule=data)


def batches_of(data: TextClassificationData, size: int, count: int | None = None) -> list[dict[str, Tensor]]:
    """Batches of test rows in the order of the file, as they would arrive."""
    rows = data.predict_dataloader().dataset
    starts = list(range(0, len(rows), size))[:count]
    return [data.collate([rows[i] for i in range(start, min(start + size, len(rows)))]) for start in starts]


def score(model: EarlyExitModel, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Accuracy and mean number of layers."""
    right, depth, count = 0, 0, 0
    for batch in batches:
        logits, exit_layer = model.predict(batch)
        right += int((logits.argmax(-1) == batch["labels"]).sum())
        depth += int((exit_layer + 1).sum())
        count += len(logits)
    return right / count, depth / count


@torch.no_grad()
def score_plain(model: Any, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """The same of a model without exits."""
    right = sum(int((call_model(model, batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in batches)
    return right / sum(len(batch["labels"]) for batch in batches), float(model.config.num_hidden_layers)


def entropy_threshold(model: EarlyExitModel, data: TextClassificationData, floor: float) -> float:
    """The largest single threshold whose accuracy on the validation rows is at least a floor."""
    batches = list(data.val_dataloader())
    for threshold in (0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05):
        model.thresholds = threshold
        if score(model, batches)[0] >= floor:
            return threshold
    return 0.02


def plot(path: Path, frontier: list[dict[str, float]], static: list[dict[str, float]], pabee: list[dict[str, float]],
         full: float) -> None:  # fmt: skip
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points, style in (
        ("early exit", frontier, "o-"), ("static truncation", static, "s--"), ("PABEE-like", pabee, "^:"),
    ):  # fmt: skip
        axes.plot([p["speed"] for p in points], [100 * p["accuracy"] for p in points], style, label=name)
    axes.axhline(100 * full, color="0.4", linewidth=1, linestyle="--", label="all layers, before ramps")
    axes.set(xlabel="throughput / full model's, batch 32", ylabel="accuracy on SST-2 test (%)")
    axes.set_ylim(bottom=100 * min(p["accuracy"] for p in (*frontier, *static)) - 0.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "sst2-minilm-l6")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "sst2")
    parser.add_argument("--ramps", type=Path, help="a folder with a student and its ramps; none: trained here")
    parser.add_argument("--training", choices=["joint", "self_distill"], default="joint", help="all layers, or ramps")
    parser.add_argument("--ramps_behind", type=int, nargs="+", default=[0, 1, 2, 3], help="layers with a ramp, from 0")
    parser.add_argument("--exits", type=int, nargs="+", default=[0, 2], help="those of them that ours uses")
    parser.add_argument("--steps", type=int, default=2100, help="steps of 64 rows that are trained")
    parser.add_argument("--precision", default="bf16-mixed", help="of the training; all is measured in float32")
    parser.add_argument("--max_drop", type=float, default=0.015)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/early_exit"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "`isinstance.treespec")
    torch.set_num_threads(arguments.threads)
    L.seed_everything(0, verbose=False)

    data = TextClassificationData(
        train_file=arguments.data / "train.tsv", val_file=arguments.data / "dev.tsv",
        test_file=arguments.data / "test.tsv", text_columns=["sentence"], label_column="label",
        tokenizer=str(arguments.model), batch_size=64, label_names=["negative", "positive"],
    )  # fmt: skip
    data.setup()
    if arguments.ramps is None:
        student = load_pretrained(arguments.model)
        started = time.perf_counter()
        train_ramps(student, data, arguments)
        print(f"ramps trained for {arguments.steps} steps in {time.perf_counter() - started:.0f} s")
        model = EarlyExitModel(student)
        model.save_pretrained(arguments.output)
    else:
        model = EarlyExitModel.from_pretrained(arguments.ramps)
    student = model.student.eval()
    before = load_pretrained(arguments.model).eval()

    options: Any = {"exits": arguments.exits, "max_drop": arguments.max_drop}
    report = model.calibrate(data.val_dataloader(), folder=arguments.output, **options)
    print(json.dumps(report.guarantee), report.thresholds)

    def variant(thresholds: Any, criterion: Any, **options: Any) -> EarlyExitModel:
        return EarlyExitModel(student, model.ramps, thresholds, criterion, **options)

    ours = variant(report.thresholds, Confidence(), temperatures=report.temperatures)
    batches = batches_of(data, 32)
    accuracy = {
        "before": score_plain(before, batches), "full": score_plain(student, batches),
        "early exit": score(ours, batches),
    }  # fmt: skip
    closest = min(model.ramps.exits, key=lambda layer: abs(layer + 1 - accuracy["early exit"][1]))
    deebert = variant(None, Entropy())
    deebert.thresholds = entropy_threshold(deebert, data, report.metric_full - 0.005)
    patience = WholeBatchPatience(2)
    models: dict[str, Any] = {
        "before": before,
        "full": student,
        "early exit": ours,
        "early exit, sorted": variant(report.thresholds, Confidence(), temperatures=report.temperatures, sort=True),
        "never exits": variant(dict.fromkeys(arguments.exits, 1.0), Confidence(), temperatures=report.temperatures),
        "DeeBERT-like": deebert,
        "PABEE-like": variant(2, patience),
        f"static, {closest + 1} layers": variant({closest: 0.0}, Confidence()),
    }
    results: dict[str, Any] = {"guarantee": report.guarantee, "thresholds": report.thresholds, "rows": {}}
    scores = {
        name: accuracy[name] if name in ("before", "full") else score(one, batches) for name, one in models.items()
    }
    for size, count in BATCHES.items():
        some = batches_of(data, size, count)
        scores["PABEE-like"] = score(
            models["PABEE-like"], batches_of(data, size)
        )  # the batch decides; elsewhere it cannot
        there = {name: one for name, one in models.items() if name != "DeeBERT-like" or size == 1}
        speed = throughput(there, some, repeats=arguments.rounds)
        table = Table("", "accuracy", "layers", "rows / s", "ratio", title=f"batch {size}", title_justify="left")
        for name in there:
            good, depth = scores[name]
            ratio = speed[name] / speed["full"]
            results["rows"][f"{name}, batch {size}"] = {
                "accuracy": good, "mean_depth": depth, "rows_per_second": speed[name], "ratio": ratio,
            }  # fmt: skip
            table.add_row(name, f"{good:.4f}", f"{depth:.2f}", f"{speed[name]:.1f}", f"{ratio:.2f}")
        Console(width=100).print(table)

    # The frontier: other promises, other layers, other patience.
    frontier: list[tuple[str, EarlyExitModel]] = []
    for drop in (0.005, 0.01, 0.015, 0.02, 0.03, 0.05):
        again = variant({}, Confidence())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = again.calibrate(data.val_dataloader(), exits=arguments.exits, max_drop=drop)
        frontier.append(("early exit", variant(found.thresholds, Confidence(), temperatures=found.temperatures)))
    frontier += [("static", variant({layer: 0.0}, Confidence())) for layer in model.ramps.exits]
    frontier += [("PABEE-like", variant(k, WholeBatchPatience(k))) for k in (1, 2, 3)]
    some = batches_of(data, 32, 20)
    named = {str(index): one for index, (_, one) in enumerate(frontier)}
    speed = throughput({"full": student, **named}, some, repeats=3)
    points: dict[str, list[dict[str, float]]] = {"early exit": [], "static": [], "PABEE-like": []}
    for index, (kind, one) in enumerate(frontier):
        good, depth = score(one, batches)
        points[kind].append({"speed": speed[str(index)] / speed["full"], "accuracy": good, "mean_depth": depth})
    results["frontier"] = points
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "benchmark.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(arguments.output / "frontier.png", *points.values(), full=accuracy["before"][0])


if __name__ == "__main__":
    main()
