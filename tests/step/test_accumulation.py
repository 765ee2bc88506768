"""Accumulated batches equal one batch, whatever adds to the loss: callbacks, balances, schedules, own terms."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_distill import DistillationModule
from lightning_distill.callbacks import EarlyExit
from lightning_distill.data import BucketBatchSampler, ResumableDataLoader
from lightning_distill.early_exit import LearnedGate
from lightning_distill.generation import OnPolicyDistillation
from lightning_distill.objectives import (
    HardLabel,
    HiddenState,
    LinearSchedule,
    Loss,
    Objective,
    PatientHiddenState,
    SoftTarget,
    UncertaintyBalance,
)
from lightning_distill.signals.signals import Signals
from lightning_distill.step.counting import before
from lightning_distill.tasks import TASKS
from tests.helpers.models import batch, bert, llama

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


def net(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def module(kind: type[DistillationModule] = DistillationModule, objectives: Any = None, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return kind(net(), net(), objectives, optimizer=lambda p: torch.optim.SGD(p, 0.5), **arguments)


def fit(made: Any, batches: Any, folder: Path, *callbacks: L.Callback, ckpt_path: Any = None, **arguments: Any) -> Any:
    settings: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False, **arguments}
    L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **settings,
    ).fit(made, batches, ckpt_path=ckpt_path)
    return made


def rows(*sizes: int) -> DataLoader[Any]:
    """All rows, cut into batches of these sizes."""
    return loader(zip(X.split(sizes), Y.split(sizes), strict=True))


def loader(batches: Iterable[Any]) -> DataLoader[Any]:
    """A loader of these batches."""
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def cut(whole: dict[str, Tensor], sizes: Sequence[int]) -> DataLoader[Any]:
    """A batch, cut into some of these sizes."""
    parts = {key: value.split(list(sizes)) for key, value in whole.items()}
    return loader({key: value[index] for key, value in parts.items()} for index in range(len(sizes)))


def assert_same(one: nn.Module, two: nn.Module, start: nn.Module | None = None) -> None:
    moved = 0.0
    for name, value in one.state_dict().items():
        torch.testing.assert_close(
            two.state_dict()[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        if start is not None:
            moved = max(moved, float((value - start.state_dict()[name]).abs().max()))
    assert start is None or moved > 1e-3


class OwnTerm(DistillationModule):
    """A loss of the user's own, with a parameter of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = nn.Parameter(torch.zeros(()))
        self.gradients: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.extra

    def on_train_start(self) -> None:
        """Without ``super``: looking ahead does not depend on it."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.extra.grad is not None
        self.gradients.append(float(self.extra.grad))
        super().on_before_optimizer_step(optimizer)


class OwnMean(DistillationModule):
    """A mean over rows of the user's own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        own = self.student(batch[0]).square().mean()
        return loss + self.mean_over_step("own", own, batch, lambda one: torch.tensor(len(one[0])))


class Balanced(DistillationModule):
    """A balance with parameters, which counts how often it is asked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balance = UncertaintyBalance(["soft_target", "hard_label"])
        self.asked = 0

    def total_loss(self, losses: dict[str, Tensor]) -> Tensor:
        self.asked += 1
        total: Tensor = self.balance(losses)
        return total


class Confident(Objective):
    """What counts depends on the teacher's answers."""

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        values = (teacher.logits - student.logits).square().mean(-1)
        return Loss(values, teacher.logits.argmax(-1) != 0)


class Replaced(DistillationModule):
    """Its own step for the student."""

    def student_step(self, batch: Any) -> Signals:
        signals = super().student_step(batch)
        signals.mask = torch.arange(len(signals.logits)) % 2 == 0
        return signals


SPLITS = {"equal": (4, 4, 4, 4), "unequal": (1, 6, 7, 2)}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("window", [4, 6], ids=["whole window", "short window"])
@pytest.mark.parametrize(
    ("kind", "objectives"),
    [
        (DistillationModule, None),
        (OwnTerm, None),
        (OwnMean, None),
        (Balanced, None),
        (DistillationModule, [SoftTarget(), Confident(weight=2.0)]),
        (DistillationModule, [HardLabel(), HiddenState([("1", "1")])]),
    ],
    ids=["default", "own term", "own mean", "balance", "own objective", "module paths"],
)
def test_equals_one_batch(
    kind: type[DistillationModule], objectives: Any, window: int, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    whole = fit(module(kind, objectives), rows(16), tmp_path)
    split = fit(module(kind, objectives), rows(*sizes), tmp_path, accumulate_grad_batches=window)
    assert whole.global_step == split.global_step == 1
    assert_same(whole, split, module(kind, objectives))
    if kind is OwnTerm:
        assert whole.gradients == split.gradients == [1.0]
    if kind is Balanced:
        assert (whole.asked, split.asked) == (1, 4)


def test_a_step_of_ones_own_is_asked_what_counts(tmp_path: Path) -> None:
    # Rows at even places of their batch count, so the same rows do however they are split into even sizes.
    whole, split = module(Replaced), module(Replaced)
    fit(whole, rows(16), tmp_path)
    fit(split, rows(2, 8, 4, 2), tmp_path, accumulate_grad_batches=4)
    assert_same(whole, split, module(Replaced))


def test_a_weight_that_rises_from_0(tmp_path: Path) -> None:
    def made() -> Any:
        return module(objectives=[SoftTarget(weight=LinearSchedule(0.0, 1.0))])

    whole = fit(made(), rows(8, 8), tmp_path)
    split = fit(made(), rows(3, 5, 6, 2), tmp_path, accumulate_grad_batches=2)
    assert_same(whole, split, made())


def test_rows_without_a_label_count_nothing(tmp_path: Path) -> None:
    labels = Y.clone()
    labels[[0, 1, 2, 3, 9]] = -100  # all of the first batch

    def batches(*sizes: int) -> DataLoader[Any]:
        return loader(zip(X.split(sizes), labels.split(sizes), strict=True))

    whole = fit(module(objectives=[HardLabel()]), batches(16), tmp_path)
    with pytest.warns(UserWarning, match="has no label"):
        split = fit(module(objectives=[HardLabel()]), batches(4, 7, 5), tmp_path, accumulate_grad_batches=3)
    assert_same(whole, split, module())


def tokens(*sizes: int) -> DataLoader[Any]:
    made = batch("token_classification", rows=12, classes=3, seed=3)
    made["labels"][2, 1:] = -100
    return cut(made, sizes)


def berts(objectives: Any) -> DistillationModule:
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher, student = (bert("TokenClassification", num_labels=3, layers=layers, **still) for layers in (3, 2))
    return DistillationModule(teacher, student, objectives, optimizer=lambda p: torch.optim.SGD(p, 0.5))


def test_objectives_that_count_different_items(tmp_path: Path) -> None:
    objectives = [HardLabel(), HiddenState(weight=2.0), PatientHiddenState([(1, 2)], name="rows")]
    whole = fit(berts(objectives), tokens(12), tmp_path)
    split = fit(berts(objectives), tokens(1, 6, 2, 3), tmp_path, accumulate_grad_batches=4)
    assert_same(whole.student, split.student, berts(objectives).student)


@pytest.mark.parametrize("training", ["joint", "two_stage", "self_distill"])
def test_ramps(training: Any, tmp_path: Path) -> None:
    weight = 0.0 if training == "self_distill" else 0.5

    def exits() -> EarlyExit:
        return EarlyExit([0], LearnedGate(), training, teacher_weight=weight)

    whole = fit(berts(None), tokens(12), tmp_path, exits())
    split = fit(berts(None), tokens(1, 6, 2, 3), tmp_path, exits(), accumulate_grad_batches=4)
    still = fit(berts(None), tokens(12), tmp_path, exits(), max_epochs=0)
    assert_same(whole.student.ramps, split.student.ramps)
    assert_same(whole.student, split.student, still.student)


def test_ramps_of_any_module_have_the_whole_gradient(tmp_path: Path) -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            self.model = bert(num_labels=3, **still)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.5)

    made = batch("classification", rows=12, classes=3)
    found = []
    for sizes in ((12,), (3, 3, 3, 3)):
        found.append(fit(Plain(), cut(made, sizes), tmp_path, EarlyExit([0]), accumulate_grad_batches=len(sizes)))
    assert_same(*found)


def test_on_policy_texts_of_different_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is written is a function of the row, so that it is the same however the rows are split.
    def write(self: Any, batch: Any, seed: int) -> dict[str, Tensor]:
        return {"input_ids": (batch["input_ids"] * 7 + 1) % 60, "labels": batch["labels"]}

    monkeypatch.setattr(OnPolicyDistillation, "write", write)

    def made() -> OnPolicyDistillation:
        torch.manual_seed(0)
        objectives = [SoftTarget(1.0, "reverse_kl"), HardLabel()]
        settings: dict[str, Any] = {"on_policy": 1.0, "prompt_length": 3, "max_new_tokens": 6}
        return OnPolicyDistillation(
            llama(layers=3), llama(), objectives, optimizer=lambda p: torch.optim.SGD(p, 0.5), **settings
        )

    whole_batch = batch("causal_lm", rows=12)
    found = []
    for sizes in ((12,), (1, 6, 2, 3)):
        found.append(fit(made(), cut(whole_batch, sizes), tmp_path, accumulate_grad_batches=len(sizes)))
    assert_same(found[0].student, found[1].student, made().student)


# -- looking ahead ---------------------------------------------------------------------------------------------------


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


class Watch(L.Callback):
    """Which rows each batch had, and after which batches a step was taken."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append([int((row == X).all(1).nonzero()) for row in batch[0]])
        self.steps.append(trainer.global_step)


LOADERS: dict[str, Callable[[], Any]] = {
    "rows": lambda: DataLoader(TensorDataset(X, Y), 3),
    "stream": lambda: DataLoader(Stream(), 3),
    "unequal": lambda: rows(1, 6, 1, 2, 3, 3),
}


@pytest.mark.parametrize("made_loader", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_steps": 3, "max_epochs": -1}, {"limit_train_batches": 5}, {"reload_dataloaders_every_n_epochs": 1}],
    ids=["epochs", "steps", "limit", "reload"],
)
def test_the_loop_meets_the_batches_that_it_would_meet(
    made_loader: Callable[[], Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.net(batch[0]).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    watches = [Watch(), Watch()]
    for made, watch in zip((Plain(), module()), watches, strict=True):
        fit(made, made_loader(), tmp_path, watch, **{"max_epochs": 2, "accumulate_grad_batches": 4, **settings})
    assert watches[0].rows == watches[1].rows
    assert watches[0].steps == watches[1].steps


def test_the_size_of_a_window_may_change(tmp_path: Path) -> None:
    def run(sizes: tuple[int, ...], scheduling: dict[int, int]) -> Any:
        return fit(module(), rows(*sizes), tmp_path, GradientAccumulationScheduler(scheduling), max_epochs=2)

    assert_same(run((16,), {0: 1}), run((1, 6, 7, 2), {0: 6, 1: 4}), module())


def test_transfer_hooks_run_once_on_each_batch(tmp_path: Path) -> None:
    class Hooks(DistillationModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["x"] + 1, batch["y"]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

    seen = []

    class See(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0])

    whole = {"x": X, "y": Y}
    split = fit(module(Hooks), cut(whole, (1, 6, 7, 2)), tmp_path, See(), accumulate_grad_batches=4)
    torch.testing.assert_close(torch.cat(seen), (X + 1) * 2)
    assert_same(fit(module(Hooks), cut(whole, (16,)), tmp_path), split, module())


@pytest.mark.parametrize("stop", [2, 4], ids=["within a window", "after one"])
def test_a_resumed_run_goes_on_at_its_next_batch(stop: int, tmp_path: Path) -> None:
    def resumable() -> ResumableDataLoader:
        return ResumableDataLoader(TensorDataset(X, Y), BucketBatchSampler([4] * 16, 2))

    class Cut(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, idx: int) -> None:
            if idx + 1 == stop:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    whole, rest = Watch(), Watch()
    fit(module(), resumable(), tmp_path, whole, Cut(), accumulate_grad_batches=4)
    fit(module(), resumable(), tmp_path, rest, accumulate_grad_batches=4, ckpt_path=tmp_path / "cut.ckpt")
    assert rest.rows == whole.rows[stop:]
    assert rest.steps == whole.steps[stop:]


def test_a_validation_within_a_window_disturbs_nothing(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return rows(1, 6, 7, 2)

        def val_dataloader(self) -> Any:
            return rows(8, 8)

    settings: dict[str, Any] = {"accumulate_grad_batches": 4, "val_check_interval": 2, "enable_checkpointing": True}
    split = fit(module(), Data(), tmp_path, ModelCheckpoint(tmp_path), **settings)
    assert_same(fit(module(), rows(16), tmp_path), split, module())


def test_labels_and_masks_are_all_that_is_known_of_a_batch_ahead() -> None:
    made = batch("causal_lm", rows=3)
    signals = before(TASKS["causal_lm"], made)
    assert signals.logits.shape == (3, 7, 0)
    assert signals.mask is not None
    assert torch.equal(signals.mask, made["labels"][:, 1:] != -100)
