"""Which objective earns its cost: a teacher distilled with each combination of objectives, side by side.

python benchmarks/objectives.py                              # SST-2, two students; also the picture
python benchmarks/objectives.py --job trec --rows 3000       # every objective, one student; 40 minutes on 2 cores
python benchmarks/objectives.py --job cifar10 --batch_size 128 --epochs 5    # on pictures; an hour on 2 cores
python benchmarks/objectives.py --job trec --dry --rows 64 --epochs 1 --seeds 0 1 --only SoftTarget Correlation
python benchmarks/objectives.py --job trec --write_only     # the tables again, from the results that are there

All combinations of a seed train in lockstep: the same batches, one forward of the teacher for all of them, then a step
of each student. So a machine that slows down slows all alike. Every student takes the same number of steps; the two
stages of TinyBERT share them. Seconds are one thread's CPU time: the student's own steps, and the teacher's forward
for those that have one. Everything runs in float32, as a processor without bfloat16 instructions takes many times as
long with them. Seeds run in a process each, as many at a time as there are cores. A gain is that over hard labels,
paired by seed; its interval is that of Student's t at 95 %.

A run that is not ``--dry`` writes benchmarks/results/objectives_<job>.json and the job's tables in docs/objectives.md.
Needs ../shared (real data and teachers); the jobs are in objective_jobs.py.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from objective_jobs import JOBS, SHARED, Combinations, Job
from torch import Tensor, nn

from lightning_distill.models.batch import token_mask
from lightning_distill.models.calling import call_model, logits_of
from lightning_distill.objectives import HardLabel, Objective
from lightning_distill.signals.description import describe
from lightning_distill.signals.recorder import Recorder
from lightning_distill.signals.signals import Request, Signals

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "objectives.md"
# Of Student's t: 97.5 % for 2, 3, ... seeds.
T975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


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
        # A learned temperature is one number, which has to move through its range in a few hundred steps.
        numbers, others = ([p for p in self.parameters if (p.ndim == 0) == alone] for alone in (True, False))
        groups = [{"params": others}, {"params": numbers, "lr": 1e-2, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, self.lr, weight_decay=0.01, fused=True)
        self.schedule = transformers.get_linear_schedule_with_warmup(self.optimizer, int(0.06 * self.steps), self.steps)

    def train(self, batch: dict[str, Tensor], teacher: Signals | None) -> None:
        began = time.process_time()
        student = signals(self.student, self.recorder, batch)
        stage = self.stages[self.step * len(self.stages) // self.steps]
        losses = []
        for objective in stage:
            objective.set_progress(self.step / self.steps)
            losses.append(objective.weight * objective(student, teacher).mean())
        self.optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.seconds += time.process_time() - began


def signals(model: nn.Module, recorder: Recorder, batch: dict[str, Tensor]) -> Signals:
    logits = logits_of(call_model(model, batch))
    return Signals(logits, batch["labels"], None, token_mask(batch), **recorder.take())


@torch.inference_mode()
def accuracy(model: nn.Module, job: Job) -> float:
    model.eval()
    right = [(logits_of(call_model(model, batch)).argmax(-1) == batch["labels"]) for batch in job.data.test()]
    return 100 * torch.cat(right).double().mean().item()


def teacher_of(job: Job, epochs: int, rows: int | None) -> nn.Module:
    """The teacher, fine-tuned on the labels where it has no head of its own."""
    torch.manual_seed(0)
    teacher = job.teacher()
    if job.teacher_lr is not None:
        batches = job.data.training(rows, epochs, seed=0)
        racer = Racer(teacher.train(), [[HardLabel()]], len(batches), job.teacher_lr)
        racer.start(teacher)
        for batch in batches:
            racer.train(batch, None)
        racer.recorder.remove()
    return teacher.eval().requires_grad_(False)


def race(name: str, teacher: nn.Module, shape: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train all combinations on the same batches; returns accuracy and seconds by combination."""
    torch.set_num_threads(1)
    job = JOBS[name](arguments.batch_size)
    make, lr = job.students[shape]
    batches = job.data.training(arguments.rows, arguments.epochs, seed)
    torch.manual_seed(seed)
    students: dict[str, Racer] = {}
    request = Request()
    for combination, stages in chosen(job, arguments.only).items():
        racer = students[combination] = Racer(make(teacher).train(), stages(), len(batches), lr)
        racer.start(teacher)
        request |= racer.request
    recorder, of_teacher = Recorder(teacher, request), 0.0
    for batch in batches:
        began = time.process_time()
        with torch.no_grad():
            target = signals(teacher, recorder, batch)
        of_teacher += time.process_time() - began
        for racer in students.values():
            racer.train(batch, target)
    recorder.remove()
    results = {}
    for combination, racer in students.items():
        racer.recorder.remove()
        asks = any(objective.needs_teacher for stage in racer.stages for objective in stage)
        results[combination] = {"accuracy": accuracy(racer.student, job), "seconds": racer.seconds + asks * of_teacher}
        print(f"{shape}, seed {seed}, {combination}: {results[combination]}", flush=True)
    return results


def chosen(job: Job, only: list[str] | None) -> Combinations:
    unknown = sorted(set(only or ()) - set(job.combinations))
    if unknown:
        raise SystemExit(f"Expected `--only` to name some of {list(job.combinations)}, but got {unknown}.")
    return {name: make for name, make in job.combinations.items() if not only or name in [*only, "hard labels only"]}


def summarise(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Mean accuracy and its spread over seeds, and the gain over hard labels, paired by seed, with its interval."""
    table = {}
    for name in runs[0]:
        scores = [run[name]["accuracy"] for run in runs]
        gains = [run[name]["accuracy"] - run["hard labels only"]["accuracy"] for run in runs]
        several = len(runs) > 1
        half = T975[len(runs) - 2] * statistics.stdev(gains) / len(runs) ** 0.5 if several else None
        table[name] = {
            "accuracy": round(statistics.mean(scores), 2),
            "spread": round(statistics.stdev(scores), 2) if several else None,
            "gain": round(statistics.mean(gains), 2),
            "interval": None if half is None else round(half, 2),
            "gains": [round(gain, 2) for gain in gains],
            "seconds": round(statistics.mean(run[name]["seconds"] for run in runs), 1),
        }
    return table


def tables(students: dict[str, dict[str, Any]]) -> str:
    """What docs/objectives.md shows of a job: a table for each kind of student."""
    parts = []
    for shape, rows in students.items():
        lines = [
            f"| {shape} | accuracy, % | spread | gain over hard labels (each seed) | CPU seconds |",
            "|---" * 5 + "|",
        ]
        for name, row in rows.items():
            gains = f"{_gain(row)} ({', '.join(f'{gain:+.1f}' for gain in row['gains'])})"
            spread = "" if row["spread"] is None else f"{row['spread']:.1f}"
            lines.append(f"| {name} | {row['accuracy']:.1f} | {spread} | {gains} | {row['seconds']:.0f} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _gain(row: dict[str, Any]) -> str:
    interval = row.get("interval")
    return f"{row['gain']:+.1f}" + ("" if interval is None else f" ± {interval:.1f}")


def write_guide(name: str, results: dict[str, Any]) -> None:
    """Put a job's tables between its marks."""
    text = GUIDE.read_text()
    marks = [f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"]
    if not all(mark in text for mark in marks):
        raise SystemExit(f"Expected {GUIDE} to have the marks {marks} for the tables of the job, but it lacks one.")
    before, rest = text.split(marks[0])
    settings = results["settings"]
    seeds = ", ".join(map(str, settings["seeds"]))
    says = (
        f"{settings['rows']} rows, {settings['epochs']} epochs, batches of {settings['batch_size']}, seeds {seeds}; "
        f"accuracy on {results['test']}, of which the teacher has {results['teacher']:.1f} %; "
        f"torch {results['torch']}.\n\n"
    )
    text = before + marks[0] + says + tables(results["students"]) + marks[1] + rest.split(marks[1])[1]
    GUIDE.write_text(text)


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


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All seeds of a job, some at a time."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    job = JOBS[name](arguments.batch_size)
    chosen(job, arguments.only)
    teacher = teacher_of(job, arguments.teacher_epochs, arguments.rows if arguments.dry else None)
    of_teacher = accuracy(teacher, job)
    print(f"teacher: {of_teacher:.2f}", flush=True)
    students = {}
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(min(cores, len(arguments.seeds)), mp_context=get_context("spawn")) as pool:
        for shape in job.students:
            runs = [pool.submit(race, name, teacher, shape, seed, arguments) for seed in arguments.seeds]
            students[shape] = summarise([each.result() for each in runs])
    kept = ("rows", "epochs", "teacher_epochs", "batch_size", "seeds")
    settings = {key: value for key, value in vars(arguments).items() if key in kept}
    found = {"settings": settings, "torch": torch.__version__, "teacher": round(of_teacher, 2), "test": job.test}
    return found | {"students": students}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(JOBS), default="sst2")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--teacher_epochs", type=int, default=3, help="of a teacher that has to be fine-tuned first")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of combinations; hard labels are always there")
    parser.add_argument("--dry", action="store_true", help="print the tables and write nothing")
    parser.add_argument("--write_only", action="store_true", help="write the guide from the results that are there")
    arguments = parser.parse_args()
    if not 1 <= len(arguments.seeds) <= len(T975) + 1:
        parser.error(f"--seeds takes 1 to {len(T975) + 1} seeds")
    output = (
        Path(__file__).parent / "results" / f"objectives{'' if arguments.job == 'sst2' else '_' + arguments.job}.json"
    )
    if arguments.write_only:
        write_guide(arguments.job, json.loads(output.read_text()))
        return
    if not SHARED.is_dir():
        parser.error(f"needs the folder of real data at {SHARED}, which is not here")
    results = run(arguments.job, arguments)
    print(f"\n{tables(results['students'])}")
    if arguments.dry or arguments.only:
        return
    output.write_text(json.dumps(results, indent=2) + "\n")
    write_guide(arguments.job, results)
    if arguments.job == "sst2":
        plot(results["students"], results["teacher"], ROOT / "docs" / "images" / "objectives.png")


if __name__ == "__main__":
    main()
