"""The teacher is out of reach of all that walks the module, and is given back as it was."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.model_summary import summarize
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillationModule
from lightning_distill.callbacks import EarlyExit
from lightning_distill.objectives import HardLabel, HiddenState, SoftTarget
from tests.helpers.models import batch, bert

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
DATA = DataLoader(TensorDataset(X, torch.arange(16) % 3), 4)


def net() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    made[1].running_mean.fill_(3.0)  # type: ignore[operator, union-attr]
    return made


def module(teacher: nn.Module | None = None, **arguments: Any) -> DistillationModule:
    optimizer = lambda parameters: torch.optim.SGD(parameters, 0.1)  # noqa: E731
    return DistillationModule(net() if teacher is None else teacher, net(), optimizer=optimizer, **arguments)


def trainer(folder: Path, *callbacks: L.Callback, **arguments: Any) -> L.Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    settings = {"max_epochs": 3, "accelerator": "cpu", "default_root_dir": folder, **quiet, **arguments}
    return L.Trainer(callbacks=list(callbacks), **settings)


def everything(model: nn.Module) -> dict[str, Any]:
    """What a user can see of a model."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": {name: part.training for name, part in model.named_modules()},
        "grads": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": {
            name: len(part._forward_hooks) + len(part._forward_pre_hooks) for name, part in model.named_modules()
        },
    }


def assert_as_it_was(model: nn.Module, before: dict[str, Any]) -> None:
    after = everything(model)
    for name, value in before["state"].items():
        assert torch.equal(after["state"][name], value), name
    for what in ("modes", "grads", "hooks"):
        assert after[what] == before[what], what
    assert all(parameter.grad is None for parameter in model.parameters())


CALLBACKS: dict[str, Callable[[], L.Callback]] = {
    "pruning": lambda: ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False),
    "swa": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=0.5),
    "ema": lambda: WeightAveraging(avg_fn=lambda average, new, count: (average + new) / 2),
}


@pytest.mark.filterwarnings("ignore:.*")  # theirs
@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
def test_callbacks_of_lightning_do_not_reach_it(callback: Callable[[], L.Callback], tmp_path: Path) -> None:
    teacher = net()
    teacher[4].requires_grad_(False)
    teacher[1].eval()
    before = everything(teacher)
    trainer(tmp_path, callback()).fit(module(teacher), DATA)
    assert_as_it_was(teacher, before)


def wipe(part: nn.Module) -> None:
    for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
        tensor.data.zero_()


def replace(part: nn.Module) -> None:
    for name, child in part.named_children():
        if isinstance(child, nn.Linear):
            setattr(part, name, nn.Identity())
        else:
            replace(child)


WALKS: dict[str, Callable[[DistillationModule], Any]] = {
    "apply": lambda made: made.apply(wipe),
    "requires_grad_": lambda made: made.requires_grad_(True),
    "train": lambda made: made.train(),
    "children": replace,
    "parameters": lambda made: [parameter.data.zero_() for parameter in made.parameters()],
    "buffers": lambda made: [buffer.zero_() for buffer in made.buffers()],
    "modules": lambda made: [part.reset_running_stats() for part in made.modules() if isinstance(part, nn.BatchNorm1d)],
    "compile": lambda made: [part.train() for _, part in made.named_modules()],
    "load_state_dict": lambda made: made.load_state_dict({k: v * 0 for k, v in made.state_dict().items()}),
    "to_empty": lambda made: made.student.to_empty(device="cpu"),
}


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_what_walks_the_module_does_not_reach_it(walk: Callable[[DistillationModule], Any]) -> None:
    made = module()
    before = everything(made.teacher)  # type: ignore[arg-type]
    assert not any(before["modes"].values())
    walk(made)
    assert_as_it_was(made.teacher, before)  # type: ignore[arg-type]


def test_it_moves_and_is_cast_with_the_module() -> None:
    made = module()
    made.double()
    assert made.teacher[0].weight.dtype == torch.float64  # type: ignore[index, union-attr]
    assert made.teacher[1].running_mean.dtype == torch.float64  # type: ignore[index, union-attr]
    nn.Sequential(made).to("meta")
    assert made.teacher[0].weight.device.type == "meta"  # type: ignore[index, union-attr]


def test_a_copy_has_a_teacher_of_its_own() -> None:
    made = module()
    other = copy.deepcopy(made)
    assert other.teacher is not made.teacher
    assert other.teacher is not None
    torch.testing.assert_close(other.teacher.state_dict(), made.teacher.state_dict())  # type: ignore[union-attr]
    assert not any(parameter.requires_grad for parameter in other.teacher.parameters())


def test_what_is_counted_is_what_is_trained() -> None:
    made = module()
    assert summarize(made).total_parameters == sum(p.numel() for p in made.student.parameters())  # type: ignore[attr-defined]


class Broken(Exception):
    pass


class Fails(L.Callback):
    def __init__(self, where: str) -> None:
        self.where = where

    def on_train_batch_end(self, *_: Any) -> None:
        if self.where == "training":
            raise Broken

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.where == "validation":
            raise Broken


@pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode")
@pytest.mark.parametrize("where", ["nowhere", "training", "validation", "student"])
def test_both_models_are_given_back_after_a_run_and_after_a_failure(where: str, tmp_path: Path) -> None:
    teacher = bert(num_labels=3, layers=3).train()
    teacher.bert.embeddings.eval().requires_grad_(False)
    student = bert(num_labels=3)
    before = everything(teacher)
    made = DistillationModule(teacher, student, [SoftTarget(), HardLabel(), HiddenState()])
    student.bert.embeddings.eval()
    own = everything(student)
    if where == "student":

        def fail(*_: Any) -> Any:
            raise Broken

        student.classifier.register_forward_hook(fail)
        own = everything(student)
    data = DataLoader([batch("classification", classes=3)], batch_size=None)  # type: ignore[arg-type]
    run = trainer(tmp_path, Fails(where), EarlyExit([0]), num_sanity_val_steps=0, max_epochs=1)
    if where == "nowhere":
        run.fit(made, data, data)
    else:
        with pytest.raises(Broken):
            run.fit(made, data, data)
    assert_as_it_was(teacher, before)
    after = everything(student)
    for what in ("modes", "grads", "hooks"):
        assert {name: after[what][name] for name in own[what]} == own[what], what


def test_a_second_run_and_a_step_outside_of_one_have_it_in_eval(tmp_path: Path) -> None:
    made = module()
    modes: set[bool] = set()
    made.teacher[3].register_forward_hook(lambda part, *_: modes.add(part.training))  # type: ignore[index, union-attr]
    for _ in range(2):
        trainer(tmp_path, max_epochs=1).fit(made, DATA)
        assert made.teacher.training  # type: ignore[union-attr]
        one, two = (made.teacher_step((X, None)).logits for _ in range(2))
        assert torch.equal(one, two)
        assert made.teacher.training  # type: ignore[union-attr]
    assert modes == {False}


def test_signals_of_a_forward_that_failed_are_forgotten() -> None:
    made = module(objectives=[SoftTarget(), HiddenState([("1", "1")])])
    made.losses((X, None))

    def fail(*_: Any) -> Tensor:
        raise Broken

    handle = made.student[4].register_forward_hook(fail)  # type: ignore[index, operator]
    with pytest.raises(Broken):
        made.losses((X, None))
    handle.remove()
    assert not any(part._forward_hooks for part in made.student.modules())
    assert made.losses((X, None)).keys() == {"soft_target", "hidden_state"}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_that_casts_weights_gives_the_teacher_back_as_it_was(precision: Any, tmp_path: Path) -> None:
    teacher = net()
    before = everything(teacher)
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append({tensor.dtype for tensor in pl_module.teacher.parameters()})

    made = DistillationModule(
        teacher, net(), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4)
    )
    for _ in range(2):  # a second run casts it again
        trainer(tmp_path, Look(), precision=precision, max_epochs=1).fit(made, DATA)
        assert_as_it_was(teacher, before)
        assert {value.dtype for value in teacher.parameters()} == {torch.float32}
    wanted = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}[precision]
    assert len(seen) == 8
    assert all(dtypes == {wanted} for dtypes in seen)


def test_the_weights_of_a_folder_are_not_kept(tmp_path: Path) -> None:
    for name in ("teacher", "student"):
        bert().save_pretrained(tmp_path / name)
    made = DistillationModule(str(tmp_path / "teacher"), str(tmp_path / "student"))
    made.to(torch.bfloat16)
    assert not made._exact
    assert DistillationModule(bert(), bert()).to(torch.bfloat16)._exact


def test_a_summary_beside_it(tmp_path: Path) -> None:
    made = module()
    trainer(tmp_path, ModelSummary(-1), max_epochs=1).fit(made, DATA)
    said = str(summarize(made, max_depth=-1))
    assert "student.0" in said
    assert "teacher" not in said


class WithBackbone(DistillationModule):
    @property
    def backbone(self) -> nn.Module:
        return self.student[:4]  # type: ignore[index, no-any-return, operator]


@pytest.mark.filterwarnings("ignore:.*")  # theirs
def test_a_backbone_that_is_unfrozen_is_the_students(tmp_path: Path) -> None:
    teacher = net()
    teacher[4].requires_grad_(False)
    before = everything(teacher)
    made = WithBackbone(teacher, net(), optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1))
    start = {name: value.clone() for name, value in made.student.state_dict().items()}
    frozen = trainer(tmp_path, BackboneFinetuning(unfreeze_backbone_at_epoch=9, verbose=False), max_epochs=2)
    frozen.fit(made, DATA)
    assert torch.equal(made.student.state_dict()["0.weight"], start["0.weight"])
    assert not torch.equal(made.student.state_dict()["4.weight"], start["4.weight"])
    assert_as_it_was(teacher, before)
    trainer(tmp_path, BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)).fit(made, DATA)
    assert not torch.equal(made.student.state_dict()["0.weight"], start["0.weight"])
    assert_as_it_was(teacher, before)


@pytest.mark.filterwarnings("ignore:.*")  # theirs
@pytest.mark.parametrize("when", ["before a run", "in a run"])
def test_quantisation_aware_training_of_torch_does_not_reach_it(when: str, tmp_path: Path) -> None:
    teacher = net()
    before = everything(teacher)
    made = module(teacher)

    class Prepare(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
            pl_module.train()
            torch.ao.quantization.prepare_qat(pl_module, inplace=True)

    run = trainer(tmp_path, *([Prepare()] if when == "in a run" else []))
    if when == "before a run":
        Prepare().on_fit_start(run, made)
    run.fit(made, DATA)
    assert any("FakeQuantize" in type(part).__name__ for part in made.student.modules())
    assert_as_it_was(teacher, before)
    made.student.eval()
    converted = torch.ao.quantization.convert(made, inplace=False)
    assert any("quantized" in type(part).__module__ for part in converted.student.modules())  # type: ignore[union-attr]
    assert_as_it_was(teacher, before)
    dynamic = torch.ao.quantization.quantize_dynamic(module(teacher), {nn.Linear}, inplace=True)
    assert "quantized" in type(dynamic.student[4]).__module__
    dynamic.give_back()
    assert_as_it_was(teacher, before)
