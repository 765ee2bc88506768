"""Which objective earns its cost: the SST-2 teacher distilled with each combination, side by side.

python benchmarks/objectives.py            # prints the table, writes benchmarks/results/objectives.json and the picture
python benchmarks/objectives.py --rows 500 --seeds 0
python benchmarks/objectives.py --more     # the other objectives on the first student, into objectives_more.json

All combinations train in lockstep in one process: the same batches, one forward of the teacher for all of them, then a
step of each student. So a machine that slows down slows all alike. Every student takes the same number of steps; the
two stages of TinyBERT share them. Seconds are one thread's CPU time: the student's own steps, and the teacher's
forward for those that have one. Everything runs under bfloat16 autocast, as with bf16-mixed.

Needs ../shared (SST-2 and a real teacher).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_distill import student_from_teacher
from lightning_distill.data import BucketBatchSampler, TextClassificationData
from lightning_distill.models.batch import token_mask
from lightning_distill.models.calling import call_model, logits_of
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.objectives import (
    AttentionMap,
    AttentionRelation,
    AttentionTransfer,
    Contrastive,
    Flow,
    HardLabel,
    HiddenState,
    HiddenStateCosine,
    LogitsCosine,
    LogitsMSE,
    NeuronSelectivity,
    Objective,
    PatientHiddenState,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
    SoftTarget,
    UniversalLogit,
)
from lightning_distill.signals.description import describe
from lightning_distill.signals.recorder import Recorder
from lightning_distill.signals.signals import Request, Signals

SHARED = Path(__file__).resolve().parents[2] / "shared"
STUDENTS = {
    "3 layers, width 384": {"num_layers": 3, "layers": "uniform"},
    "4 layers, width 192": {"num_layers": 4, "width": 0.5, "layers": "uniform"},
}
LR = {"3 layers, width 384": 8e-5, "4 layers, width 192": 5e-4}


def predictions() -> list[Objective]:
    return [SoftTarget(temperature=2.0, weight=0.7), HardLabel(weight=0.3)]


# Each combination is one list of objectives a stage; stages share the steps evenly.
COMBINATIONS: dict[str, Callable[[], list[list[Objective]]]] = {
    "hard labels only": lambda: [[HardLabel()]],
    "soft": lambda: [predictions()],
    "soft + hidden": lambda: [[*predictions(), HiddenState("uniform")]],
    "soft + attention": lambda: [[*predictions(), AttentionMap("uniform", "kl")]],
    "soft + relations": lambda: [[*predictions(), AttentionRelation()]],
    "TinyBERT, two stages": lambda: [
        [HiddenState("uniform", embedding=True), AttentionMap("uniform")],
        [SoftTarget(temperature=1.0)],
    ],
    "all": lambda: [[*predictions(), HiddenState("uniform"), AttentionMap("uniform", "kl"), AttentionRelation()]],
}

# What is added to the two predictions has its defaults and weight 1. Two classes leave nothing to compare for Decoupled
# and TopKSoftTarget.
OTHERS: list[Callable[[], Objective]] = [
    LogitsMSE,
    LogitsCosine,
    UniversalLogit,
    lambda: HiddenStateCosine([(2, 5)]),  # of the last layers, as DistilBERT has it
    PatientHiddenState,
    Flow,
    NeuronSelectivity,
    AttentionTransfer,
    SimilarityPreserving,
    RelationalDistance,
    RelationalAngle,
    Contrastive,
]
MORE: dict[str, Callable[[], list[list[Objective]]]] = {
    **{name: COMBINATIONS[name] for name in ("hard labels only", "soft")},
    **{f"soft + {type(make()).__name__}": lambda make=make: [[*predictions(), make()]] for make in OTHERS},
}


@dataclass
class Racer:
    """A student in training, with its own optimizer and its own clock."""

    student: Any
    stages: list[list[Objective]]
    steps: int
    lr: float
    seconds: float = 0.0
    step: int = 0
    request: Request = field(default_factory=Request)

    def start(self, teacher: nn.Module) -> None:
        infos = describe(self.student), describe(teacher)
        objectives = [objective for stage in self.stages for objective in stage]
        of_student = Request()
        for objective in objectives:
            objective.bind(*infos)
            of_student |= objective.student_request
            self.request |= objective.teacher_request
        self.recorder = Recorder(self.student, of_student)
        self.parameters = [*self.student.parameters(), *nn.ModuleList(objectives).parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, self.lr, weight_decay=0.01)
        self.schedule = transformers.get_linear_schedule_with_warmup(self.optimizer, int(0.06 * self.steps), self.steps)

    def train(self, batch: dict[str, Tensor], teacher: Signals) -> None:
        began = time.process_time()
        student = signals(self.student, self.recorder, batch)
        stage = self.stages[self.step * len(self.stages) // self.steps]
        loss = torch.stack([objective.weight * objective(student, teacher).mean() for objective in stage]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.seconds += time.process_time() - began


def signals(model: nn.Module, recorder: Recorder, batch: dict[str, Tensor]) -> Signals:
    # As `--trainer.precision bf16-mixed` does; the objectives compute in float32 themselves.
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(call_model(model, batch))
    return Signals(logits, batch["labels"], None, token_mask(batch), **recorder.take())


@torch.inference_mode()
def accuracy(model: nn.Module, data: TextClassificationData) -> float:
    model.eval()
    right = [
        (logits_of(call_model(model, batch)).argmax(-1) == batch["labels"]).sum().item()
        for batch in data.test_dataloader()
    ]
    return 100 * sum(right) / len(data.rows("test"))


def race(
    combinations: dict[str, Callable[[], list[list[Objective]]]],
    shape: str,
    seed: int,
    data: TextClassificationData,
    teacher: nn.Module,
    rows: int,
    epochs: int,
) -> dict[str, dict[str, float]]:
    """Train all combinations on the same batches; returns accuracy and seconds by combination."""
    dataset = data.train_dataloader().dataset
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:rows].tolist()
    sampler = BucketBatchSampler([dataset.lengths[row] for row in chosen], data.batch_size, seed=seed)
    racers = {
        name: Racer(student_from_teacher(teacher, **STUDENTS[shape]), stages(), epochs * len(sampler), LR[shape])
        for name, stages in combinations.items()
    }
    torch.manual_seed(seed)
    request = Request()
    for racer in racers.values():
        racer.start(teacher)
        request |= racer.request
    recorder, of_teacher = Recorder(teacher, request), 0.0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for group in sampler:
            batch = data.collate([dataset[chosen[index]] for index in group])
            began = time.process_time()
            with torch.no_grad():
                target = signals(teacher, recorder, batch)
            of_teacher += time.process_time() - began
            for racer in racers.values():
                racer.train(batch, target)
    recorder.remove()
    results = {}
    for name, racer in racers.items():
        racer.recorder.remove()
        asks = any(objective.needs_teacher for stage in racer.stages for objective in stage)
        results[name] = {"accuracy": accuracy(racer.student, data), "seconds": racer.seconds + asks * of_teacher}
        print(f"{shape}, seed {seed}, {name}: {results[name]}", flush=True)
    return results


def summarise(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Mean accuracy and its spread over seeds; the gain over hard labels is paired by seed."""
    table = {}
    for name in runs[0]:
        scores = [run[name]["accuracy"] for run in runs]
        gains = [run[name]["accuracy"] - run["hard labels only"]["accuracy"] for run in runs]
        table[name] = {
            "accuracy": round(statistics.mean(scores), 2),
            "spread": round(statistics.stdev(scores), 2) if len(scores) > 1 else None,
            "gain": round(statistics.mean(gains), 2),
            "gains": [round(gain, 2) for gain in gains],
            "seconds": round(statistics.mean(run[name]["seconds"] for run in runs), 1),
        }
    return table


def plot(results: dict[str, dict[str, dict[str, Any]]], teacher: float, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(results), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (shape, table) in enumerate(results.items()):
        axes = figure.add_subplot(1, len(results), index + 1)
        for number, (name, row) in enumerate(table.items()):
            axes.errorbar(
                row["seconds"], row["accuracy"], row["spread"] or 0, fmt="o", capsize=3, color=f"C{number}", label=name
            )
        axes.axhline(teacher, linestyle="--", linewidth=1, color="0.4", label=f"teacher: {teacher:.1f}")
        axes.set(title=shape, xlabel="CPU seconds of training", ylabel="accuracy on SST-2 test, %")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if index == 0:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--more", action="store_true", help="the other objectives, each beside soft target and label")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/objectives.json, or objectives_more")
    parser.add_argument(
        "--picture", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "objectives.png"
    )
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        parser.error(f"needs the folder of real data at {SHARED}, which is not here")
    torch.set_num_threads(1)
    path = SHARED / "models" / "sst2-minilm-l6"
    files = {
        f"{split}_file": SHARED / "data" / "sst2" / f"{name}.tsv"
        for split, name in (("train", "train"), ("val", "dev"), ("test", "test"))
    }
    data = TextClassificationData(**files, tokenizer=path, batch_size=arguments.batch_size)
    data.setup()
    teacher = load_pretrained(path).eval().requires_grad_(False)
    of_teacher = accuracy(teacher, data)
    results = {}
    combinations = MORE if arguments.more else COMBINATIONS
    for shape in list(STUDENTS)[: 1 if arguments.more else None]:
        runs = [
            race(combinations, shape, seed, data, teacher, arguments.rows, arguments.epochs) for seed in arguments.seeds
        ]
        results[shape] = summarise(runs)
        print(f"\n| {shape} | accuracy, % | spread | gain over hard labels, each seed | CPU seconds |\n{'|---' * 5}|")
        for name, row in results[shape].items():
            gains = f"{row['gain']:+.2f} ({', '.join(f'{gain:+.1f}' for gain in row['gains'])})"
            print(f"| {name} | {row['accuracy']} | {row['spread']} | {gains} | {row['seconds']:.0f} |")
        print()
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "picture")}
    file = f"objectives{'_more' * arguments.more}.json"
    output = arguments.output or Path(__file__).parent / "results" / file
    output.parent.mkdir(exist_ok=True)
    written = {"settings": settings, "torch": torch.__version__, "teacher": round(of_teacher, 2), "students": results}
    output.write_text(json.dumps(written, indent=2) + "\n")
    if not arguments.more:
        plot(results, of_teacher, arguments.picture)


if __name__ == "__main__":
    main()
