"""Signals, and losses that are not finite: what stops a run, and what it leaves."""

import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_distill import DistillationModule, newest_checkpoint
from lightning_distill.callbacks import FiniteLoss, GradientClipping, Resumable
from lightning_distill.training.checkpoint import read_checkpoint
from tests.callbacks.registry import Regression, same, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Step left out"),  # in a process that a test starts
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),  # a scaler leaves the first steps out
]


class Send(L.Callback):
    """Sends signals to its own process at one moment of step 2."""

    def __init__(self, number: int, moment: str = "backward", times: int = 1, rank: int = 0) -> None:
        self.number, self.moment, self.times, self.rank = number, moment, times, rank

    def _look(self, trainer: L.Trainer, moment: str) -> None:
        if moment == self.moment and trainer.global_step >= 2 and trainer.global_rank == self.rank and self.times:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
            self.times = 0

    def on_after_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer, "backward")

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer, "validation")


def run(folder: Path, *callbacks: L.Callback, **arguments: Any) -> None:
    trainer(folder, *callbacks, limit_val_batches=2, **arguments).fit(Regression())


@pytest.mark.parametrize(
    ("number", "code", "moment", "step"),
    [
        (signal.SIGTERM, 143, "backward", 3),
        (signal.SIGINT, 130, "backward", 3),
        (signal.SIGTERM, 143, "validation", 4),  # after step 3: the validation ends, and one more step
    ],
)
def test_a_signal_saves_after_the_step_and_exits(
    number: int, code: int, moment: str, step: int, tmp_path: Path, caplog: Any
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    trainer(tmp_path / "whole", Resumable(), limit_val_batches=2).fit(Regression())
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as exit:
        run(tmp_path / "cut", Resumable(), Send(number, moment))
    assert exit.value.code == code
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    path = tmp_path / "cut" / "interrupted.ckpt"
    assert f"after step {step}, saved to {path}. Go on with: trainer.fit(..., ckpt_path=" in caplog.text
    assert newest_checkpoint(tmp_path / "cut") == path
    resumed = trainer(tmp_path / "resumed", Resumable(), limit_val_batches=2)
    resumed.fit(Regression(), ckpt_path=path)
    one, other = (read_checkpoint(tmp_path / name / "step=5.ckpt") for name in ("whole", "resumed"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(one[part], other[part])


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, Resumable(), Send(signal.SIGINT, times=2))
    assert signal.getsignal(signal.SIGINT) == handler
    assert exit.value.code == 130
    assert not (tmp_path / "interrupted.ckpt").exists()


@pytest.mark.forks
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    def child() -> None:
        run(tmp_path, Resumable(), Send(signal.SIGTERM, rank=1), strategy="ddp_fork", devices=2)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 143  # of the process that forked the two
    assert read_checkpoint(tmp_path / "interrupted.ckpt")["global_step"] == 3


class Poisoned(Regression):
    """Its loss is NaN, or infinite, at some batches of the run."""

    def __init__(self, batches: tuple[int, ...], value: float = torch.nan, rank: int = 0) -> None:
        super().__init__()
        self.batches, self.value, self.rank, self.seen = batches, value, rank, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.seen += 1
        if self.seen - 1 in self.batches and self.global_rank == self.rank:
            loss = loss * self.value
            self.log("train_loss", loss)
        return loss


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(value: float, tmp_path: Path) -> None:
    module = Poisoned((4,), value)
    with pytest.raises(RuntimeError, match=r"but got loss = (nan|inf) at step 4, batch 1 of epoch 1; nothing"):
        trainer(tmp_path, GradientClipping(), FiniteLoss()).fit(module)
    last = read_checkpoint(tmp_path / "step=4.ckpt")["state_dict"]
    assert same(last, dict(module.state_dict()))


class SteepAtZero(Regression):
    """Its loss is finite at every batch, and at some its gradient is infinity times 0."""

    def __init__(self, batches: tuple[int, ...], rank: int = 0) -> None:
        super().__init__()
        self.batches, self.rank, self.seen = batches, rank, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.seen += 1
        if self.seen - 1 in self.batches and self.global_rank == self.rank:
            loss = loss + (self.head.weight * 0).sum().sqrt()
        return loss


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    module = SteepAtZero((4,))
    said = r"Expected finite gradients, but got NaN or infinity in head.weight at step 4, "
    with pytest.raises(RuntimeError, match=said + "batch 1 of epoch 1; nothing was updated. .*detect_anomaly"):
        trainer(tmp_path, FiniteLoss(), gradient_clip_val=1.0).fit(module)
    assert same(read_checkpoint(tmp_path / "step=4.ckpt")["state_dict"], dict(module.state_dict()))
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_of_such_gradients_are_left_out(accumulate: int, tmp_path: Path) -> None:
    finite = FiniteLoss(max_skipped=1)
    arguments = {"max_steps": 4, "limit_train_batches": 8, "accumulate_grad_batches": accumulate}
    with pytest.warns(UserWarning, match=r"Step left out \(1 of 1\): NaN or infinity in head.weight at step 2"):
        trainer(tmp_path, finite, **arguments).fit(SteepAtZero((2 * accumulate,)))
    states = [read_checkpoint(tmp_path / f"step={step}.ckpt")["state_dict"] for step in (2, 3, 4)]
    assert finite.skipped == 1
    assert same(states[0], states[1])
    assert not same(states[1], states[2])


def test_a_clipper_says_what_happens_to_such_gradients(tmp_path: Path) -> None:
    finite = FiniteLoss()
    trainer(tmp_path / "skip", finite, GradientClipping(nonfinite="skip")).fit(SteepAtZero((2,)))
    assert finite.skipped == 0
    with pytest.raises(RuntimeError, match="choose nonfinite='skip'"):
        trainer(tmp_path / "raise", finite, GradientClipping(nonfinite="raise")).fit(SteepAtZero((2,)))


def test_a_gradient_scaler_may_overflow_but_not_below_one(tmp_path: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    finite = FiniteLoss()
    trainer(tmp_path / "once", finite, plugins=plugin).fit(SteepAtZero((2,)))
    assert finite.skipped == 0
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    with pytest.raises(RuntimeError, match="Expected finite gradients"):
        trainer(tmp_path / "always", finite, plugins=plugin, max_steps=9).fit(SteepAtZero(tuple(range(20))))


def test_sparse_gradients_are_looked_at_too(tmp_path: Path) -> None:
    class Words(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(4, 2, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.words(batch[0]).sum() + (self.words(batch[0]) * 0).sum().sqrt()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(4)), batch_size=2)
    with pytest.raises(RuntimeError, match=r"in words\.weight at step 0"):
        trainer(tmp_path, FiniteLoss(), limit_val_batches=0).fit(Words(), data)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_left_out_up_to_a_number(accumulate: int, tmp_path: Path) -> None:
    before: dict[int, Any] = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            before[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}

    module, finite = Poisoned((2 * accumulate,)), FiniteLoss(max_skipped=1)
    with pytest.warns(UserWarning, match=r"Step left out \(1 of 1\): loss = nan at step 2"):
        trainer(
            tmp_path, Look(), GradientClipping(nonfinite="raise"), finite,
            max_steps=4, limit_train_batches=8, accumulate_grad_batches=accumulate,
        ).fit(module)  # fmt: skip
    assert finite.skipped == 1
    assert same(before[2], before[3])
    assert not same(before[1], before[2])
    assert not same(before[3], dict(module.state_dict()))
    with (
        pytest.warns(UserWarning, match="Step left out"),
        pytest.raises(RuntimeError, match=r"max_skipped=1 is used up.*FiniteLoss\(max_skipped=10\)"),
    ):
        trainer(tmp_path / "two", FiniteLoss(max_skipped=1)).fit(Poisoned((1, 3)))


def test_under_a_gradient_scaler_too(tmp_path: Path) -> None:
    module = Poisoned((2,), torch.inf)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    with pytest.warns(UserWarning, match="Step left out"):
        trainer(tmp_path, FiniteLoss(max_skipped=1), plugins=plugin).fit(module)
    states = [read_checkpoint(tmp_path / f"step={step}.ckpt")["state_dict"] for step in (2, 3, 4)]
    assert same(states[0], states[1])
    assert not same(states[1], states[2])
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@pytest.mark.forks
def test_all_processes_leave_the_step_out_together(tmp_path: Path) -> None:
    trainer(tmp_path, FiniteLoss(max_skipped=1), strategy="ddp_fork", devices=2).fit(Poisoned((2,), rank=1))
    states = [read_checkpoint(tmp_path / f"step={step}.ckpt") for step in (2, 3, 4)]
    assert same(states[0]["state_dict"], states[1]["state_dict"])
    assert not same(states[1]["state_dict"], states[2]["state_dict"])
    assert states[2]["callbacks"]["FiniteLoss"] == {"skipped": 1}


@pytest.mark.forks
def test_all_processes_see_such_a_gradient_of_one(tmp_path: Path) -> None:
    trainer(tmp_path, FiniteLoss(max_skipped=1), strategy="ddp_fork", devices=2).fit(SteepAtZero((2,), rank=1))
    states = [read_checkpoint(tmp_path / f"step={step}.ckpt") for step in (2, 3, 4)]
    assert same(states[0]["state_dict"], states[1]["state_dict"])
    assert not same(states[1]["state_dict"], states[2]["state_dict"])
    assert states[2]["callbacks"]["FiniteLoss"] == {"skipped": 1}


@pytest.mark.forks
def test_all_processes_stop_together(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"Expected a finite loss, but got"):
        trainer(tmp_path, strategy="ddp_fork", devices=2).fit(distillation(bad_rank=1), Rows())


class Rows(torch.utils.data.DataLoader):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(16, 4, generator=generator)
        super().__init__(torch.utils.data.TensorDataset(x, x.argmax(1)), batch_size=4)


def distillation(bad_rank: int = 0) -> DistillationModule:
    """Its teacher answers NaN from the second batch on."""
    torch.manual_seed(0)

    class Teacher(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Teacher.calls += 1
            return super().forward(x) * (torch.nan if Teacher.calls > 1 and module.global_rank == bad_rank else 1.0)

    module = DistillationModule(Teacher(4, 4), nn.Linear(4, 4))
    return module


def test_the_objective_is_named_and_the_module_is_safe_by_default(tmp_path: Path) -> None:
    module = distillation()
    fresh = trainer(tmp_path, limit_val_batches=0)
    with pytest.raises(RuntimeError, match=re.escape("got soft_target = nan at step 1, batch 1 of epoch 0")):
        fresh.fit(module, Rows())
    assert all(bool(parameter.isfinite().all()) for parameter in module.student.parameters())
    lenient = FiniteLoss(max_skipped=20)
    with pytest.warns(UserWarning, match="Step left out"):
        trainer(tmp_path / "lenient", lenient, limit_val_batches=0).fit(distillation(), Rows())
    assert lenient.skipped == 4


def test_the_newest_checkpoint_of_a_folder_of_several(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "best", monitor="train_loss", save_last=True)
    L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[saves, Resumable()], enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    ).fit(Regression())  # fmt: skip
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "last.ckpt"
