"""Kill -9 a training at random moments, as often as asked, and see what can be loaded afterwards.

python benchmarks/kills.py --kills 50 --temporary /dev/shm --output benchmarks/results/kills.json
    One run, killed 50 times and resumed each time from its newest good checkpoint, by AtomicCheckpointIO; then the same
    with Lightning's own TorchCheckpointIO, which stages files in the folder for temporary files (here: on another file
    system than the checkpoints).

A checkpoint is written every --interval steps, each over the one before. Reported: how many kills fell into a write,
after how many no checkpoint could be loaded, the most steps lost beyond the interval, and what a save costs.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_distill import AtomicCheckpointIO, newest_checkpoint
from lightning_distill.callbacks import Resumable


class Learner(L.LightningModule):
    """A layer with AdamW: ``width**2 * 12`` bytes of checkpoint. It notes every step it has done in a file."""

    def __init__(self, width: int, note: Path) -> None:
        super().__init__()
        self.layer, self.note = nn.Linear(width, width), note

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note.write_text(str(self.global_step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(torch.zeros(100_000, self.layer.in_features), batch_size=1)


def train(folder: Path, io: TorchCheckpointIO, width: int, interval: int, resume: Path | None) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    saves = ModelCheckpoint(folder, "newest", every_n_train_steps=interval, enable_version_counter=False)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[saves, Resumable()], plugins=[io],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Learner(width, folder / "step"), ckpt_path=resume)


def kill_and_resume(
    folder: Path, io: TorchCheckpointIO, *, kills: int, width: int = 512, interval: int = 3, seed: int = 0
) -> dict[str, int]:
    """Kill a training again and again; what was left each time.

    Args:
        folder: Where it writes.
        io: What writes its checkpoints.
        kills: How often.
        width: Of the layer.
        interval: Steps between checkpoints.
        seed: Of the moments.

    Returns:
        ``kills``, ``in_a_write`` (a write had begun), ``nothing_left`` (no checkpoint could be loaded) and ``lost``,
        the most steps that were done and not in the newest good checkpoint.
    """
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    found = {"kills": kills, "in_a_write": 0, "nothing_left": 0, "lost": 0}
    newest: Path | None = None
    for _ in range(kills):
        begun = 0 if newest is None else torch.load(newest, weights_only=True)["global_step"]
        (folder / "step").write_text(str(begun))
        child = multiprocessing.get_context("fork").Process(target=train, args=(folder, io, width, interval, newest))
        child.start()
        while int((folder / "step").read_text() or 0) < begun + interval + 1:  # one checkpoint of its own at least
            assert child.is_alive()
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        steps = int((folder / "step").read_text() or 0)
        staged = [*folder.glob(".*.tmp"), *Path(tempfile.gettempdir()).glob("tmp*")]
        found["in_a_write"] += bool([path.unlink() for path in staged if path.is_file()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            newest = newest_checkpoint(folder)
        if newest is None:
            found["nothing_left"] += 1
        elif steps:
            found["lost"] = max(found["lost"], steps - torch.load(newest, weights_only=True)["global_step"])
    return found


def cost(folder: Path, width: int, repeats: int = 20) -> dict[str, float]:
    """Median seconds of a save, in turns."""
    state = {"state_dict": {str(index): torch.randn(width, width) for index in range(3)}}
    seconds: dict[str, list[float]] = {"AtomicCheckpointIO": [], "TorchCheckpointIO": []}
    for _ in range(repeats):
        for io in (AtomicCheckpointIO(), TorchCheckpointIO()):
            start = time.perf_counter()
            io.save_checkpoint(state, folder / "cost.ckpt")
            seconds[type(io).__name__].append(time.perf_counter() - start)
    return {name: round(statistics.median(values), 4) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--temporary", type=Path, help="folder for temporary files, on another file system")
    parser.add_argument("--interval", type=int, default=3)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as disk, tempfile.TemporaryDirectory(dir=options.temporary) as temporary:
        tempfile.tempdir = temporary
        rows["another_file_system"] = Path(disk).stat().st_dev != Path(temporary).stat().st_dev
        rows["seconds_of_a_save"] = cost(Path(disk), options.width)
        for io in (AtomicCheckpointIO(), TorchCheckpointIO()):
            folder = Path(disk) / type(io).__name__
            rows[type(io).__name__] = kill_and_resume(
                folder, io, kills=options.kills, width=options.width, interval=options.interval
            )
    print(json.dumps(rows, indent=2))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
