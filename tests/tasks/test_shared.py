"""What must be true of every task, run over the registry."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule
from lightning_distill.objectives import HardLabel, SoftTarget
from lightning_distill.tasks import TASKS
from tests.tasks.registry import ROWS, Row

every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def module_of(row: Row, student: Any, **arguments: Any) -> DistillationModule:
    return DistillationModule(row.make(layers=3), student, [SoftTarget(), HardLabel()], **row.told, **arguments)


def test_every_task_is_in_the_registry() -> None:
    assert {row.task for row in ROWS} == set(TASKS)


@every_row
def test_hard_label_equals_a_loss_of_others(row: Row) -> None:
    student = row.make()
    module = module_of(row, student).eval()
    assert module.task == row.task
    for seed in range(3):
        data = row.batch(seed)
        torch.testing.assert_close(module.losses(data)["hard_label"], row.oracle(student, data), atol=1e-6, rtol=1e-6)


@every_row
def test_a_mean_is_that_of_its_parts_by_what_counts(row: Row) -> None:
    module = module_of(row, row.make()).eval()
    whole = row.batch(3, rows=6)
    for objective in module.objectives.values():
        parts = []
        for rows in (slice(0, 1), slice(1, 6)):
            part = {key: value[rows] for key, value in whole.items()}
            parts.append(objective(module.student_step(part), module.teacher_step(part)))
        together = objective(module.student_step(whole), module.teacher_step(whole))
        count = sum(loss.count() for loss in parts)
        assert count == together.count()
        torch.testing.assert_close(sum(loss.sum() for loss in parts) / count, together.mean())


@every_row
def test_it_trains_validates_and_is_tested(row: Row, tmp_path: Path) -> None:
    teacher, student = row.make(layers=3), row.make()
    before = copy.deepcopy(teacher.state_dict())
    module = DistillationModule(teacher, student, **row.told)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "log_every_n_steps": 1, "default_root_dir": tmp_path}
    run = L.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    loader = DataLoader([row.batch(seed) for seed in range(4)], batch_size=None)
    run.fit(module, loader, loader)
    logged = {"train_loss", "train_soft_target", "train_hard_label", "val_loss", "val_soft_target", "val_agreement"}
    assert logged | {f"val_{row.metric}"} <= set(run.callback_metrics)
    (scores,) = run.test(module, loader, verbose=False)
    assert {f"test_{row.metric}", "test_agreement", "test_loss"} <= set(scores)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
