"""One training step: DistillationModule under a Trainer against a loop written by hand, side by side.

python benchmarks/step.py                 # prints the table, writes benchmarks/results/step.json
python benchmarks/step.py --rounds 20

The same student, teacher, loss, optimizer and batches. The two take turns of a few steps in one process; the time of a
step is from the end of one to the end of the next, so it holds all that the Trainer does between them. Peak memory is
the high-water mark of a process of each one's own, on Linux (on a GPU: the allocator's).
"""

import argparse
import copy
import itertools
import json
import logging
import multiprocessing
import os
import re
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule

SIZES = {  # student (layers, width), teacher (layers, width)
    "tiny": ((2, 128), (4, 256)),
    "mini": ((4, 256), (8, 512)),
    "small": ((4, 512), (8, 768)),
}
BATCH, LENGTH, STEPS = 32, 64, 5


def make(layers: int, width: int) -> transformers.BertForSequenceClassification:
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64
    )
    return transformers.BertForSequenceClassification(config)


def batches(count: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(1000, 30000, (BATCH, LENGTH), generator=generator),
            "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
            "labels": torch.randint(0, 2, (BATCH,), generator=generator),
        }
        for _ in range(count)
    ]
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


class Clock(L.Callback):
    """Writes down when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def by_trainer(student: Any, teacher: Any, steps: int) -> list[float]:
    clock = Clock()
    module = DistillationModule(teacher, student, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5))
    L.Trainer(
        max_steps=steps,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, batches(steps))
    return [after - before for before, after in itertools.pairwise(clock.ends)]


def by_hand(student: Any, teacher: Any, steps: int) -> list[float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student.to(device).train()
    teacher.to(device).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    ends = []
    for batch in batches(steps):
        batch = {key: value.to(device) for key, value in batch.items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            soft = teacher(**batch).logits
        logits = student(**batch).logits
        kl = F.kl_div(
            F.log_softmax(logits / 2, -1), F.log_softmax(soft / 2, -1), reduction="batchmean", log_target=True
        )
        loss = 0.7 * 4 * kl + 0.3 * F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(ends)]


def peak(run: Any, size: str, queue: Any) -> None:
    """Peak memory in MB of a few steps in a process of their own."""
    student, teacher = (make(*shape) for shape in SIZES[size])
    run(student, teacher, 4)
    if torch.cuda.is_available():
        queue.put(torch.cuda.max_memory_allocated() / 2**20)
    else:
        # Not ru_maxrss: a process begins with that of the one that made it.
        status = Path("/proc/self/status").read_text()
        queue.put(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)  # type: ignore[index]


def measure(size: str, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    student, teacher = (make(*shape) for shape in SIZES[size])
    teacher.requires_grad_(False)
    runs = {"trainer": by_trainer, "by_hand": by_hand}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            measured = run(copy.deepcopy(student), teacher, STEPS + 1)
            if turn:  # the first turn warms the caches up
                times[name] += measured
    row = {f"{name}_ms": 1000 * statistics.median(values) for name, values in times.items()}
    row["ratio"] = row["trainer_ms"] / row["by_hand_ms"]
    context = multiprocessing.get_context("spawn")
    for name, run in runs.items():
        queue = context.Queue()
        process = context.Process(target=peak, args=(run, size, queue))
        process.start()
        row[f"{name}_peak_mb"] = queue.get()
        process.join()
    row["peak_ratio"] = row["trainer_peak_mb"] / row["by_hand_peak_mb"]
    return {key: round(value, 3) for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["mini", "small"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step.json")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    results = {}
    for size in arguments.sizes:
        results[size] = measure(size, arguments.rounds)
        print(size, results[size])
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps({"torch": torch.__version__, "sizes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
