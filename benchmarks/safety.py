"""What Resumable and FiniteLoss cost: the step of a small student with both, and with neither, in turns.

python benchmarks/safety.py --output benchmarks/results/safety.json
    BERT of 4 layers, width 256, 8 rows of 32 tokens, on the CPU. Medians of rounds in one process.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule
from lightning_distill.callbacks import FiniteLoss, Resumable


class Unchecked(DistillationModule):
    """Without the FiniteLoss that is on by default."""

    def configure_callbacks(self) -> list[L.Callback]:
        return []


class Clock(L.Callback):
    """Milliseconds from the start of one batch to the start of the next."""

    def __init__(self) -> None:
        self.last, self.times = 0.0, []

    def on_train_batch_start(self, *_: Any) -> None:
        now = time.perf_counter()
        if self.last:
            self.times.append(1000 * (now - self.last))
        self.last = now


def steps(module: type[DistillationModule], *callbacks: L.Callback, folder: str) -> list[float]:
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 1000}
    teacher, student = (
        transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=layers, **shape))
        for layers in (4, 2)
    )
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}
        for ids in torch.randint(3, 1000, (8 * 40, 32))
    ]
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[clock, *callbacks], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module(teacher, student), DataLoader(rows, batch_size=8))
    return clock.times[5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    kinds: dict[str, Any] = {
        "neither": (Unchecked,),
        "FiniteLoss": (Unchecked, FiniteLoss),
        "Resumable": (Unchecked, Resumable),
        "both": (Unchecked, FiniteLoss, Resumable),
    }
    medians: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, (module, *callbacks) in kinds.items():
                made = [callback() for callback in callbacks]
                medians[name].append(statistics.median(steps(module, *made, folder=folder)))
    found = {f"ms_per_step_{name}": round(statistics.median(values), 3) for name, values in medians.items()}
    print(json.dumps(found, indent=2))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
