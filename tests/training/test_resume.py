"""A run with everything on, cut at twelve places, equals the run without a break."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_distill import AtomicCheckpointIO, DistillationModule, newest_checkpoint
from lightning_distill.callbacks import GradientClipping, InitPolicy, LossAdvice, LRFinder, Resumable
from lightning_distill.cli.report import CurvesLogger, read_curves
from lightning_distill.data import BucketBatchSampler, ResumableDataLoader
from lightning_distill.objectives import HardLabel, HiddenState, LinearSchedule, SoftTarget
from tests.callbacks.registry import same
from tests.helpers.models import bert

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*more than one .* process group"),
    pytest.mark.filterwarnings("ignore:LRFinder keeps the configured"),
]
ROWS, BATCH, EPOCHS = 22, 4, 3
STEPS = -(-ROWS // BATCH)  # an epoch


class Rows(torch.utils.data.Dataset):
    """Rows of tokens of different lengths, from a fixed seed."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.lengths = torch.randint(3, 12, (rows,), generator=generator).tolist()
        self.tokens = torch.randint(3, 64, (rows, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = torch.arange(12) < self.lengths[index]
        ids = self.tokens[index].masked_fill(~mask, 0)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.sum() % 2}


class Data(L.LightningDataModule):
    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> ResumableDataLoader:
        rows = Rows(ROWS)
        return ResumableDataLoader(rows, BucketBatchSampler(rows.lengths, BATCH, seed=5), num_workers=self.num_workers)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(Rows(10), batch_size=5)


def module() -> DistillationModule:
    """A distillation whose every part has state or draws numbers: dropout, schedules, a plateau, momentum."""
    torch.manual_seed(3)
    teacher, student = bert(layers=2), bert(layers=2)
    assert student.config.hidden_dropout_prob == 0.1
    objectives = [SoftTarget(LinearSchedule(4.0, 1.0), weight=0.5), HardLabel(), HiddenState(weight=0.1)]

    def schedule(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        # As any schedule of known length asks; Lightning then builds the loaders before it reads their state.
        assert made.trainer.estimated_stepping_batches == EPOCHS * STEPS
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.5)
        return {"scheduler": plateau, "monitor": "val_loss"}

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3)

    made = DistillationModule(teacher, student, objectives, optimizer=optimizer, lr_scheduler=schedule)
    return made


def trainer(folder: Path, *callbacks: L.Callback, **arguments: Any) -> L.Trainer:
    """Everything on; a checkpoint at every step and every validation."""
    checkpoints = [
        ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(folder, "best-{epoch}", monitor="val_loss", save_last=True),
    ]
    everything: list[L.Callback] = [
        InitPolicy("auto", only="all", output_dir=folder / "audit"),
        LRFinder("valley", num_steps=32, min_lr=1e-5, max_lr=1e-2, output_dir=folder / "audit"),
        # Lightning averages all of the module. Integer buffers would be cut (4.99 to 4, so BERT's positions move), and
        # the frozen teacher is averaged with itself, which only a power of two does without rounding.
        EMAWeightAveraging(decay=0.5, use_buffers=False),
        Resumable(seed=11),
        GradientClipping("percentile", threshold=70.0, history=8),
        LossAdvice(window=2),
    ]
    defaults: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "val_check_interval": STEPS // 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": CurvesLogger(folder, "logs", keep=True),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "plugins": [AtomicCheckpointIO()],
    }
    return L.Trainer(**{**defaults, "callbacks": [*everything, *callbacks, *checkpoints], **arguments})


class At(L.Callback):
    """Does something at some moments of a run, the moment as its argument."""

    def __init__(self, moments: list[tuple[str, int]], do: Callable[[tuple[str, int]], object]) -> None:
        self.moments, self.do = list(moments), do

    def _look(self, trainer: L.Trainer, moment: str) -> None:
        if (moment, trainer.global_step) in self.moments and not trainer.sanity_checking:
            self.moments.remove((moment, trainer.global_step))
            self.do((moment, trainer.global_step))

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer, "batch")

    def on_after_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer, "backward")

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer, "epoch")


# Twelve: inside of every epoch, before, in and after a validation, at the first step and the last.
BREAKS = [
    ("batch", 1),
    ("validation", 3),
    ("batch", STEPS - 1),
    ("validation", STEPS),
    ("epoch", STEPS),
    ("batch", STEPS),
    ("backward", STEPS + 1),
    ("batch", STEPS + 3),
    ("validation", 2 * STEPS),
    ("epoch", 2 * STEPS),
    ("backward", 2 * STEPS + 2),
    ("validation", 3 * STEPS),
]


# With workers, which are ahead of the training, one of each kind; all of them with `-m slow`.
FOUR = [("validation", 3), ("batch", STEPS + 3), ("epoch", 2 * STEPS), ("backward", 2 * STEPS + 2)]


def kill(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def place(folder: Path, moment: tuple[str, int]) -> Path:
    """Where what a run has on the disk at a moment is kept: what a kill would leave there."""
    return folder / " ".join(map(str, moment))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def final(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return checkpoint


@pytest.mark.forks
@pytest.mark.parametrize(
    ("num_workers", "breaks"), [(0, BREAKS), (2, FOUR), pytest.param(2, BREAKS, marks=pytest.mark.slow)]
)
def test_a_run_cut_at_many_places_equals_the_run_without_a_break(
    num_workers: int, breaks: list[tuple[str, int]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    copy = At(breaks, lambda moment: shutil.copytree(folder, place(tmp_path, moment)))
    trainer(folder, copy).fit(module(), datamodule=Data(num_workers))
    whole, curves = final(folder), read_curves(folder / "logs" / "metrics.csv")
    assert copy.moments == []
    assert whole["global_step"] == EPOCHS * STEPS
    assert len(curves["train_soft_target"][0]) == EPOCHS * STEPS
    assert len(curves["val_accuracy"][0]) == 2 * EPOCHS
    for moment, step in breaks:
        shutil.rmtree(folder)
        if (moment, step) == breaks[0]:  # killed indeed
            cut = trainer(folder, At(breaks[:1], kill))
            child = multiprocessing.get_context("fork").Process(
                target=cut.fit, args=(module(),), kwargs={"datamodule": Data(num_workers)}
            )
            child.start()
            child.join()
            assert child.exitcode == -signal.SIGKILL
            left, kept = files(folder), files(place(tmp_path, (moment, step)))
            assert left == kept
        else:
            shutil.move(place(tmp_path, (moment, step)), folder)
        newest = newest_checkpoint(folder)
        assert newest is not None
        begun = torch.load(newest, weights_only=True)["global_step"]
        assert begun == step
        trainer(folder).fit(module(), datamodule=Data(num_workers), ckpt_path=newest)
        resumed = final(folder)
        for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
            assert same(resumed[part], whole[part]), f"{part} after a break at {moment} {step}"
        for name, state in whole["callbacks"].items():
            if "ModelCheckpoint" not in name:
                assert same(resumed["callbacks"][name], state), f"{name} after a break at {moment} {step}"
        # What was logged, by name and step: as if nothing had happened.
        assert read_curves(folder / "logs" / "metrics.csv") == curves, f"after a break at {moment} {step}"
