"""However a batch is split, over processes or over steps, and however unequal the parts, the training is the same."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_distill import DistillationModule
from lightning_distill.data import BucketBatchSampler, ResumableDataLoader
from lightning_distill.objectives import HardLabel, HiddenState, Objective, SoftTarget
from tests.helpers.models import batch, bert, llama

# Forking is what keeps this test short; torch says of it what multiprocessing says of every fork.
pytestmark = [
    pytest.mark.forks,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


class Rows(L.LightningDataModule):
    """The suite's own sampler: two processes share each batch of one. It is made where the processes are known."""

    def __init__(self, task: str, batch_size: int, unlabelled: int) -> None:
        super().__init__()
        data = batch(task, rows=12, classes=3)
        data["labels"][12 - unlabelled :] = -100
        self.rows = [{key: value[row] for key, value in data.items()} for row in range(12)]
        self.size = batch_size

    def train_dataloader(self) -> ResumableDataLoader:
        return ResumableDataLoader(self.rows, BucketBatchSampler([8] * 12, self.size))

    def val_dataloader(self) -> ResumableDataLoader:
        return ResumableDataLoader(self.rows, BucketBatchSampler([8] * 12, self.size, shuffle=False))


def pair(task: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Teacher and student, the same each time, without dropout: two processes would draw other masks than one."""
    torch.manual_seed(0)
    if task == "causal_lm":
        return llama(layers=3), llama()
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return bert(num_labels=3, layers=3), bert(num_labels=3, **still)


def fit(
    task: str,
    folder: Path,
    *,
    devices: int = 1,
    accumulate: int = 1,
    hidden: float = 0.2,
    batch_size: int = 4,
    logits: bool = True,
    unlabelled: int = 0,
) -> DistillationModule:
    teacher, student = pair(task)
    objectives: list[Objective] = [SoftTarget(weight=0.5), HardLabel(weight=0.3)] if logits else []
    objectives += [HiddenState(weight=hidden)] if hidden else []
    module = DistillationModule(teacher, student, objectives, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    settings: dict[str, Any] = {"devices": devices, "strategy": "ddp_fork" if devices > 1 else "auto"}
    L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
        default_root_dir=folder,
        **settings,
    ).fit(module, datamodule=Rows(task, batch_size // devices // accumulate, unlabelled))
    return module


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_two_processes_give_the_weights_of_one(task: str, tmp_path: Path) -> None:
    assert_same_training(task, fit(task, tmp_path), fit(task, tmp_path, devices=2))


@pytest.mark.filterwarnings("ignore:A batch of the .* data has no label")
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_process_without_a_label_counts_nothing(task: str, tmp_path: Path) -> None:
    one, two = (fit(task, tmp_path, devices=devices, hidden=0.0, unlabelled=8) for devices in (1, 2))
    assert_same_training(task, one, two)


def test_a_head_that_no_objective_reaches_is_no_error_of_ddp(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"hidden": 1.0, "logits": False}
    one, two = (fit("classification", tmp_path, devices=devices, **settings) for devices in (1, 2))
    assert_same_training("classification", one, two)
    untouched = pair("classification")[1].classifier.weight
    assert torch.equal(two.student.classifier.weight, untouched)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_accumulated_batches_give_the_weights_of_one_batch(task: str, devices: int, tmp_path: Path) -> None:
    whole = fit(task, tmp_path, batch_size=12)
    split = fit(task, tmp_path, batch_size=12, devices=devices, accumulate=3)
    assert_same_training(task, whole, split)


def test_a_short_last_window_is_a_mean_too(tmp_path: Path) -> None:
    # All 12 rows in one step, as a window of five batches that the end of the epoch cuts to four.
    whole = fit("causal_lm", tmp_path, batch_size=12)
    split = fit("causal_lm", tmp_path, batch_size=15, accumulate=5)
    assert whole.global_step == split.global_step == 2
    assert_same_training("causal_lm", whole, split)


def assert_same_training(task: str, one: DistillationModule, two: DistillationModule) -> None:
    start = pair(task)[1].state_dict()
    moved = 0.0
    for name, value in one.student.state_dict().items():
        torch.testing.assert_close(two.student.state_dict()[name], value, atol=1e-6, rtol=1e-5)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3
