"""DistillationModule: the teacher's place, checkpoints, preflight; tasks are in tests/tasks."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import safetensors.torch
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule
from lightning_distill.callbacks import GradientClipping
from lightning_distill.objectives import HardLabel, HiddenState, SoftTarget
from lightning_distill.signals import Signals
from tests.helpers.models import batch, bert

# A resumed run keeps writing where the first one wrote.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def loader() -> DataLoader[Any]:
    return DataLoader([batch("classification", classes=3, seed=seed) for seed in range(4)], batch_size=None)


def trainer(folder: Path, **kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    settings |= {"log_every_n_steps": 1}
    return L.Trainer(**{**settings, **kwargs})


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 3))


def points(rows: int = 12, size: int = 4) -> DataLoader[Any]:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(torch.utils.data.TensorDataset(x, torch.arange(rows) % 3), batch_size=size)


def test_agreement_and_accuracy_are_those_of_the_predictions(tmp_path: Path) -> None:
    module = DistillationModule(net(16), net(8))
    (scores,) = trainer(tmp_path).test(module, points(size=5), verbose=False)
    x, y = points().dataset.tensors  # type: ignore[attr-defined]
    module.eval()
    student, teacher = module.student(x).argmax(-1), module.teacher(x).argmax(-1)
    assert scores["test_agreement"] == pytest.approx((student == teacher).float().mean().item())
    assert scores["test_accuracy"] == pytest.approx((student == y).float().mean().item())


def test_logged_total_is_the_weighted_sum(tmp_path: Path) -> None:
    module = DistillationModule(net(16), net(8), [SoftTarget(weight=0.25, temperature=3.0), HardLabel(weight=2.0)])
    run = trainer(tmp_path, max_steps=1, log_every_n_steps=1)
    run.fit(module, points())
    logged = run.callback_metrics
    expected = 0.25 * logged["train_soft_target"] + 2.0 * logged["train_hard_label"]
    torch.testing.assert_close(logged["train_loss"], expected)
    norm = torch.stack([p.grad.norm() for p in module.student.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(logged["grad_norm"], norm)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_norm_that_is_logged_is_the_one_before_clipping(algorithm: Any, tmp_path: Path) -> None:
    logged = []
    for callbacks in ([], [GradientClipping(algorithm, 1e-4)]):
        torch.manual_seed(0)
        run = trainer(tmp_path, max_steps=1, log_every_n_steps=1, callbacks=callbacks)
        run.fit(DistillationModule(net(16), net(8)), points())
        logged.append(run.callback_metrics["grad_norm"])
    torch.testing.assert_close(*logged)
    assert logged[0] > 1e-2


def test_the_teacher_is_frozen_and_in_eval(tmp_path: Path) -> None:
    class Watch(L.Callback):
        modes: list[tuple[bool, bool]] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            self.modes.append((module.student.training, module.teacher.training))  # type: ignore[union-attr]

    student = bert(num_labels=3).eval()
    module = DistillationModule(bert(num_labels=3, layers=3).train(), student)
    module.train()
    assert student.training
    assert not any(part.training for part in module.teacher.modules())
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    run = trainer(tmp_path, max_epochs=2, callbacks=[Watch()])
    run.fit(module, loader(), loader())
    assert set(Watch.modes) == {(True, False)}
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in student.parameters()}


def test_no_byte_of_the_teacher_in_a_checkpoint_and_it_resumes(tmp_path: Path) -> None:
    def module() -> DistillationModule:
        torch.manual_seed(1)
        return DistillationModule(net(512), net(8), [SoftTarget(), HardLabel()])

    def checkpoint() -> dict[str, Any]:
        return {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(tmp_path, filename="one", save_top_k=-1)]}

    first = module()
    trainer(tmp_path, **checkpoint()).fit(first, points())
    path = tmp_path / "one.ckpt"
    saved = torch.load(path, weights_only=True)
    assert all(key.startswith("student.") for key in saved["state_dict"])
    assert path.stat().st_size < 4 * sum(p.numel() for p in first.teacher.parameters())
    assert DistillationModule.load_from_checkpoint(path, teacher=net(512), student=net(8), weights_only=True)

    resumed = module()
    trainer(tmp_path, max_epochs=2, **checkpoint()).fit(resumed, points(), ckpt_path=path)
    assert resumed.trainer.global_step == 6

    lacking = {key: value for key, value in saved["state_dict"].items() if key != "student.0.bias"}
    with pytest.raises(RuntimeError, match=r"student\.0\.bias"):
        module().load_state_dict(lacking)


def test_weight_averaging_keeps_the_teacher_out_too(tmp_path: Path) -> None:
    def callbacks() -> dict[str, Any]:
        checkpoint = ModelCheckpoint(tmp_path, filename="averaged")
        return {"enable_checkpointing": True, "callbacks": [WeightAveraging(), checkpoint]}

    trainer(tmp_path, **callbacks()).fit(DistillationModule(net(64), net(8)), points())
    saved = torch.load(tmp_path / "averaged.ckpt", weights_only=True)
    assert not [key for key in saved["state_dict"] if "teacher" in key]
    assert not [key for key in saved.get("averaging_state", {}) if "teacher" in key]
    again = DistillationModule(net(64), net(8))
    trainer(tmp_path, max_epochs=2, **callbacks()).fit(again, points(), ckpt_path=tmp_path / "averaged.ckpt")
    assert again.trainer.global_step == 6


def test_paths_are_hyper_parameters_and_objects_are_not(tmp_path: Path) -> None:
    bert(num_labels=3, layers=3).save_pretrained(tmp_path / "teacher")
    bert(num_labels=3).save_pretrained(tmp_path / "student")
    module = DistillationModule(str(tmp_path / "teacher"), str(tmp_path / "student"), optimizer=torch.optim.SGD)
    assert dict(module.hparams) == {
        "teacher": str(tmp_path / "teacher"),
        "student": str(tmp_path / "student"),
        "task": "auto",
        "teacher_precision": None,
        "gradient_checkpointing": False,
        "lr_scheduler_interval": "epoch",
        "lr_scheduler_monitor": None,
    }
    assert module.student.dtype == torch.float32
    assert module.student.training


def test_export_of_a_transformers_student(tmp_path: Path) -> None:
    student = bert(num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    module = DistillationModule(bert(num_labels=3, layers=3), student, [SoftTarget(), HiddenState()])
    trainer(tmp_path).fit(module, loader())
    module.export(tmp_path / "student")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    data = batch("classification", classes=3)
    data.pop("labels")
    torch.testing.assert_close(loaded(**data).logits, student.eval()(**data).logits)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_export_of_a_plain_student(tmp_path: Path) -> None:
    class Student(L.LightningModule):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = net(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    student = Student(8)
    DistillationModule(net(16), student).export(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["init_args"] == {"width": 8}
    assert described["class_path"].endswith("Student")
    again = Student(**described["init_args"])
    safetensors.torch.load_model(again, str(tmp_path / "model.safetensors"))
    x = torch.randn(2, 4)
    torch.testing.assert_close(again.eval()(x), student.eval()(x))


def test_classes_in_another_order_are_realigned() -> None:
    names = [{"no": 0, "yes": 1, "maybe": 2}, {"maybe": 0, "no": 1, "yes": 2}]
    student, teacher = (bert(label2id=n, id2label={i: k for k, i in n.items()}) for n in names)
    module = DistillationModule(teacher, student)
    data = batch("classification", classes=3)
    raw = teacher(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    torch.testing.assert_close(module.teacher_step(data).logits, raw[:, [1, 2, 0]])


def test_without_a_teacher_it_is_fine_tuning(tmp_path: Path) -> None:
    module = DistillationModule(None, net(8))
    run = trainer(tmp_path)
    run.fit(module, points(), points())
    assert "val_accuracy" in run.callback_metrics
    assert "val_agreement" not in run.callback_metrics
    with pytest.raises(ValueError, match=r"Expected argument `teacher` to be a model.*soft_target"):
        DistillationModule(None, net(8), [SoftTarget()])


def test_the_teacher_rests_where_no_objective_needs_it(tmp_path: Path) -> None:
    calls = 0

    class Teacher(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return super().forward(x)

    trainer(tmp_path).fit(DistillationModule(Teacher(4, 3), net(8), [HardLabel()]), points())
    assert calls == 0
    trainer(tmp_path).fit(DistillationModule(Teacher(4, 3), net(8)), points())
    assert calls == 3


def test_schedules_follow_the_training(tmp_path: Path) -> None:
    weights: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            weights.append(module.objectives["soft_target"].weight)

    module = DistillationModule(net(16), net(8), [SoftTarget(weight=lambda progress: 1.0 - progress), HardLabel()])
    trainer(tmp_path, max_epochs=2, callbacks=[Watch()]).fit(module, points())
    assert weights == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


class _Broken(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float("nan")


def test_preflight_at_construction() -> None:
    shared = net(8)
    with pytest.raises(ValueError, match="to have its own parameters"):
        DistillationModule(shared, shared)
    with pytest.raises(ValueError, match="same `num_labels`"):
        DistillationModule(bert(num_labels=3), bert(num_labels=2))
    with pytest.raises(ValueError, match="same `vocab_size`"):
        DistillationModule(bert("MaskedLM"), bert("MaskedLM", vocab_size=VOCAB_OTHER))
    with pytest.raises(ValueError, match="name the same classes"):
        DistillationModule(
            bert(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}),
            bert(id2label={0: "a", 1: "c"}, label2id={"a": 0, "c": 1}),
        )
    with pytest.raises(ValueError, match="different names, but got 'hard_label' twice"):
        DistillationModule(net(8), net(4), [HardLabel(), HardLabel()])
    with pytest.raises(ValueError, match="at least one objective"):
        DistillationModule(net(8), net(4), [])
    with pytest.raises(ValueError, match="a weight above 0"):
        DistillationModule(net(8), net(4), [SoftTarget(weight=0.0), HardLabel(weight=0.0)])
    with pytest.raises(ValueError, match="to have a head"):
        DistillationModule(bert("SequenceClassification"), bert("MultipleChoice"))
    with pytest.raises(TypeError, match=r"Expected argument `student` to be an nn\.Module"):
        DistillationModule(net(8), 3)  # type: ignore[arg-type]


VOCAB_OTHER = 65


@pytest.mark.parametrize(
    ("teacher", "rows", "message"),
    [
        (_Broken(4, 3), [(torch.zeros(2, 4), torch.tensor([0, 1]))], "finite logits"),
        (nn.Linear(4, 5), [(torch.zeros(2, 4), torch.tensor([0, 1]))], "logits of the same shape"),
        (nn.Linear(4, 3), [(torch.zeros(2, 4), torch.tensor([0, 3]))], r"in \[0, 2\], but got 3"),
        (nn.Linear(4, 3), [(torch.zeros(2, 4), torch.tensor([0, -1]))], r"in \[0, 2\], but got -1"),
    ],
)
def test_preflight_on_the_first_batch(teacher: nn.Module, rows: list[Any], message: str, tmp_path: Path) -> None:
    module = DistillationModule(teacher, nn.Linear(4, 3))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(module, DataLoader(rows, batch_size=None))


def test_preflight_of_every_batch_before_it_moves(tmp_path: Path) -> None:
    module = DistillationModule(bert(num_labels=3, layers=3), bert(num_labels=3))
    good, bad = batch("classification", classes=3), batch("classification", classes=3)
    bad["labels"][1] = 7
    with pytest.raises(ValueError, match=r"labels of a batch of the train data to be in \[0, 2\], but got 7"):
        trainer(tmp_path).fit(module, DataLoader([good, bad], batch_size=None))
    bad = batch("classification", classes=3)
    bad["attention_mask"].zero_()
    with pytest.raises(ValueError, match="to have a real token"):
        trainer(tmp_path).fit(module, DataLoader([good, bad], batch_size=None))


@pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero")
def test_empty_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training data to have at least one batch"):
        trainer(tmp_path).fit(DistillationModule(net(8), net(4)), DataLoader([], batch_size=None))


def test_what_answers_in_the_teachers_place() -> None:
    torch.manual_seed(0)
    teacher, student, x = nn.Linear(4, 3), nn.Linear(4, 3), (torch.randn(5, 4), torch.arange(5) % 3)
    module = DistillationModule(teacher, student, [SoftTarget()])
    own, signals = module.losses(x)["soft_target"], module.teacher_signals(x)
    asked: list[Any] = []

    def source(batch: Any) -> Signals:
        asked.append(batch)
        return Signals(signals.logits + torch.tensor([9.0, 0.0, 0.0]), signals.labels)

    module.teacher_source = source
    assert module.losses(x)["soft_target"] > own + 0.1
    assert asked == [x]
    module.teacher_source = None
    assert torch.equal(module.losses(x)["soft_target"], own)

    class OwnSignals(DistillationModule):
        def teacher_signals(self, batch: Any) -> Signals:
            return source(batch)

    assert OwnSignals(teacher, student, [SoftTarget()]).losses(x)["soft_target"] > own + 0.1

    class OwnStep(DistillationModule):
        def teacher_step(self, batch: Any) -> Signals:
            return super().teacher_step(batch)

    with pytest.raises(ValueError, match="no `teacher_step` beside `teacher_source`, but OwnStep has one"):
        OwnStep(teacher, student, [SoftTarget()]).teacher_source = source
