"""Peak memory and time of a training step: precision, quantised teacher, gradient checkpointing, 8-bit optimizer.

Run from the root of the repository: `python benchmarks/memory.py`. It prints a table and writes
`benchmarks/results/memory.json`; `--table` prints the table of that file again.

Each combination runs in a process of its own: a DistillationModule under a Trainer, a few steps, soft targets, hard
labels and hidden states. Memory on Linux is the high-water mark of the process during the fit (VmHWM, reset through
/proc/self/clear_refs) less what was resident before the models were made: weights, gradients, optimizer and
activations, as the machine has to hold them. On a GPU it is the allocator's peak. Time is the median of the steps, in
CPU seconds of one thread there (what else runs on the machine does not count), in seconds on a GPU.

The cached teacher was asked beforehand, in another process; here there is its class without its weights.
"""

import argparse
import ctypes
import gc
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule
from lightning_distill.callbacks import TeacherCache
from lightning_distill.objectives import HardLabel, HiddenState, SoftTarget

RESULTS = Path(__file__).parent / "results" / "memory.json"
STUDENT, TEACHER = (6, 256), (12, 512)  # layers, width


@dataclass(frozen=True)
class Setting:
    """One combination."""

    name: str
    precision: str = "32-true"
    teacher_precision: str | None = None
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    cached: bool = False


SETTINGS = [
    Setting("float32"),
    Setting("gradient checkpointing", gradient_checkpointing=True),
    Setting("bf16-mixed", "bf16-mixed"),
    Setting("bf16-true", "bf16-true"),
    Setting("teacher bf16", teacher_precision="bf16"),
    Setting("teacher int8", teacher_precision="int8"),
    Setting("teacher nf4", teacher_precision="nf4"),
    Setting("teacher cached", cached=True),
    Setting("optimizer 8-bit", optimizer="adamw_8bit"),
    Setting("bf16-mixed, teacher nf4, checkpointing", "bf16-mixed", "nf4", True),
    Setting("bf16-true, teacher nf4, checkpointing", "bf16-true", "nf4", True),
    Setting("bf16-true, teacher cached, checkpointing", "bf16-true", None, True, cached=True),
    Setting("all, optimizer 8-bit", "bf16-mixed", "nf4", True, "adamw_8bit"),
]


def make(layers: int, width: int) -> transformers.BertForSequenceClassification:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64
    )
    return transformers.BertForSequenceClassification(config)


def batches(count: int, rows: int, length: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    made = [
        {
            "input_ids": torch.randint(1000, 30000, (rows, length), generator=generator),
            "attention_mask": torch.ones(rows, length, dtype=torch.long),
            "labels": torch.randint(0, 2, (rows,), generator=generator),
        }
        for _ in range(count)
    ]
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


class Clock(L.Callback):
    """Writes down when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_fit_start(self, *_: Any) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading the models has left behind
            Path("/proc/self/clear_refs").write_text("5")

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() if torch.cuda.is_available() else time.process_time())


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, or VmHWM, the most so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def optimizer_of(name: str) -> Any:
    if name == "adamw":
        return lambda parameters: torch.optim.AdamW(parameters, lr=1e-5)
    if not torch.cuda.is_available():
        raise ValueError("the 8-bit optimizer of bitsandbytes needs CUDA")
    import bitsandbytes

    return lambda parameters: bitsandbytes.optim.AdamW8bit(list(parameters), lr=1e-5)


def run(setting: Setting, folder: str, sizes: tuple[int, int, int], *, fills: bool = False) -> dict[str, Any]:
    """One combination in a process of its own; where it fills the cache, the teacher is there."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    steps, rows, length = sizes
    cache = f"{folder}-cache-{setting.precision}"
    try:
        optimizer = optimizer_of(setting.optimizer)
        # Libraries that only some combinations need are no part of what is measured.
        importlib.import_module("bitsandbytes")
        importlib.import_module("lightning_distill.quantization")
        resident = memory("VmRSS")
        module = DistillationModule(
            TeacherCache.teacher(cache) if setting.cached and not fills else folder,
            make(*STUDENT),
            [SoftTarget(), HardLabel(), HiddenState()],
            optimizer=optimizer,
            teacher_precision=setting.teacher_precision,  # type: ignore[arg-type]
            gradient_checkpointing=setting.gradient_checkpointing,
        )
        clock = Clock()
        kept = TeacherCache(cache, ("logits", "hidden_states"), top_k=None)
        trainer = L.Trainer(
            max_steps=steps,
            precision=setting.precision,  # type: ignore[arg-type]
            callbacks=[clock, kept] if setting.cached else [clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, batches(steps, rows, length))
        seconds = statistics.median(after - before for before, after in itertools.pairwise(clock.ends))
        on_gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory("VmHWM") - resident
        loss = float(trainer.callback_metrics["train_loss"])
        return {"peak_mib": round(peak), "seconds": round(seconds, 3), "train_loss": round(loss, 4)}
    except ValueError as error:
        return {"refused": str(error)}


def table(results: dict[str, Any]) -> str:
    lines = ["| combination | peak memory, MiB | of float32's | step, s | of float32's |", "|---|---|---|---|---|"]
    first = results["rows"][0]
    for row in results["rows"]:
        if "refused" in row:
            lines.append(f"| {row['name']} | refused: {row['refused']} | | | |")
            continue
        shares = [f"{row[key] / first[key]:.2f}" for key in ("peak_mib", "seconds")]
        lines.append(f"| {row['name']} | {row['peak_mib']} | {shares[0]} | {row['seconds']:.2f} | {shares[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print the table of the last run")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    measured = []
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent) / "teacher")
        make(*TEACHER).save_pretrained(folder)
        for setting in SETTINGS:
            sizes = (arguments.steps, arguments.rows, arguments.length)
            if setting.cached:
                with ProcessPoolExecutor(1, context) as executor:
                    executor.submit(run, setting, folder, sizes, fills=True).result()
            with ProcessPoolExecutor(1, context) as executor:
                measured.append({**asdict(setting), **executor.submit(run, setting, folder, sizes).result()})
            print(measured[-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    sizes_of = {"student": STUDENT, "teacher": TEACHER, "batch": arguments.rows, "length": arguments.length}
    results = {"torch": torch.__version__, "device": device, **sizes_of, "rows": measured}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
