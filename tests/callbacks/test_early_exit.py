"""EarlyExit trains ramps in every mode, with and without DistillationModule, on one process and on two."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule
from lightning_distill.callbacks import EarlyExit
from lightning_distill.early_exit import EarlyExitModel, LearnedGate, Patience
from lightning_distill.early_exit.ramps import Ramps, make_ramps
from lightning_distill.signals.signals import Signals
from tests.helpers.models import bert, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:GPU available"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
LAYERS = 3


def rows(count: int = 64, task: str = "classification") -> list[dict[str, Tensor]]:
    """Rows whose label is told by their first token."""
    batch = tokens(count, 8)
    labels: Tensor = batch["input_ids"][:, 0] % 2
    if task == "token_classification":
        labels = (batch["input_ids"] % 2).masked_fill(batch["attention_mask"] == 0, -100)
    if task == "regression":
        labels = labels.float()
    return [{**{key: value[row] for key, value in batch.items()}, "labels": labels[row]} for row in range(count)]


class Module(L.LightningModule):
    """Anybody's module: its own name for the model, its own step, two groups and a schedule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model
        self.seen: list[list[float]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.net(**batch).loss, "extra": torch.ones(1)}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net.bert.parameters(), "lr": 1e-3}, {"params": self.net.classifier.parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        one = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 2)
        other = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [one, other], [2])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen.append([group["lr"] for group in self.optimizers().param_groups])


def fit(
    folder: Path,
    module: L.LightningModule,
    *callbacks: L.Callback,
    data: Any = None,
    ckpt_path: Path | None = None,
    **arguments: Any,
) -> L.Trainer:
    loader = DataLoader(data or rows(), batch_size=16)
    settings: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False, "logger": False, **arguments}
    trainer = L.Trainer(
        accelerator="cpu", callbacks=[*callbacks], default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(module, loader, DataLoader(data or rows(), batch_size=16), ckpt_path=ckpt_path)
    return trainer


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("training", ["joint", "alternate", "two_stage", "self_distill"])
def test_ramps_learn_and_the_backbone_moves_only_where_it_should(tmp_path: Path, training: Any) -> None:
    net = bert(layers=LAYERS)
    if training == "self_distill":
        with torch.no_grad():
            net.classifier.weight.mul_(30)  # a student with opinions
    module = DistillationModule(None, net, optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-2))
    before = copy_of(net)
    trainer = fit(tmp_path, module, EarlyExit(training=training, lr=5e-2), max_epochs=20)
    moved = {name for name, tensor in net.state_dict().items() if name in before and not tensor.equal(before[name])}
    assert bool(moved) is (training in ("joint", "alternate"))
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert net.bert.training
    assert "training_step" not in vars(module)
    metrics = trainer.callback_metrics
    batch = {key: torch.stack([row[key] for row in rows()]) for key in rows()[0]}
    asked, logits = EarlyExitModel(net).answers(batch)
    wanted = logits.argmax(-1) if training == "self_distill" else batch["labels"]
    for layer in (0, 1):
        right = (asked[layer][0].argmax(-1) == wanted).float().mean().item()
        assert right > (0.8 if moved else 0.7)  # a random backbone, frozen, does not tell everything
        assert f"val_exit{layer}_accuracy" in metrics
    assert "train_ramps_loss" in metrics


def test_a_module_with_groups_and_a_compound_schedule_of_its_own(tmp_path: Path) -> None:
    module = Module(bert(layers=LAYERS))
    trainer = fit(tmp_path, module, EarlyExit(lr=5e-3))
    groups = trainer.optimizers[0].param_groups
    ramps = module.net.ramps
    assert isinstance(ramps, Ramps)
    assert groups[-1]["name"] == "ramps"
    assert set(groups[-1]["params"]) == set(ramps.parameters())
    held = [parameter for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    body, head, own = zip(*module.seen, strict=True)
    # The same schedule from another peak.
    torch.testing.assert_close(torch.tensor(own), torch.tensor(body) * 5)
    torch.testing.assert_close(torch.tensor(head), torch.tensor(body) * 10)
    assert len(set(body)) > 4


def test_ramps_that_the_optimizer_holds_already_move_to_their_own_group(tmp_path: Path) -> None:
    net = bert(layers=LAYERS)
    module = DistillationModule(None, net)
    trainer = fit(tmp_path, module, EarlyExit(), max_epochs=1)
    rest, own = trainer.optimizers[0].param_groups
    assert set(own["params"]) == set(net.ramps.parameters())
    assert not set(rest["params"]) & set(own["params"])
    frozen = fit(tmp_path, DistillationModule(None, bert(layers=LAYERS)), EarlyExit(training="two_stage"), max_epochs=1)
    (only,) = frozen.optimizers[0].param_groups
    assert only["name"] == "ramps"


def test_a_teacher_teaches_the_ramps(tmp_path: Path) -> None:
    teacher = bert(layers=LAYERS)
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)
    losses = []
    for share in (0.0, 1.0):
        torch.manual_seed(0)
        net = bert(layers=LAYERS)
        module = DistillationModule(teacher, net, optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-2))
        fit(tmp_path, module, EarlyExit(training="two_stage", teacher_weight=share), max_epochs=8)
        batch = {key: torch.stack([row[key] for row in rows()]) for key in rows()[0]}
        (logits, _), _ = EarlyExitModel(net).answers(batch)[0][1], None
        target = teacher(batch["input_ids"], batch["attention_mask"]).logits
        losses.append(nn.functional.kl_div(logits.log_softmax(-1), target.softmax(-1), reduction="batchmean").item())
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize("task", ["token_classification", "regression", "gate", "decoder"])
def test_other_tasks(tmp_path: Path, task: str) -> None:
    head = "TokenClassification" if task == "token_classification" else "SequenceClassification"
    if task == "decoder":
        from tests.early_exit.models import student

        net = student("Llama")
    else:
        net = bert(head, layers=LAYERS, **({"num_labels": 1} if task == "regression" else {}))
    criterion = {"gate": LearnedGate(0.6), "regression": Patience(1, tolerance=0.2)}.get(task)
    module = DistillationModule(None, net, optimizer=lambda parameters: torch.optim.AdamW(parameters, 3e-3))
    trainer = fit(tmp_path, module, EarlyExit(criterion=criterion, lr=2e-2), data=rows(task=task), max_epochs=8)
    name = "mse" if task == "regression" else "accuracy"
    assert trainer.callback_metrics[f"val_exit0_{name}"].isfinite()
    module.export(tmp_path / "out")
    model = EarlyExitModel.from_pretrained(tmp_path / "out")
    assert repr(model.criterion) == repr(criterion or model.ramps.criterion)
    batch = {key: torch.stack([row[key] for row in rows(task=task)]) for key in rows()[0]}
    model.thresholds = {0: 1 if task == "regression" else 0.0, 1: 1 if task == "regression" else 0.0}
    exits = model.predict(batch).exit_layer
    assert exits.min() == (1 if task == "regression" else 0)
    if task == "gate":
        gate = model.answers(batch)[0][0][1]
        assert gate is not None
        right = (model.answers(batch)[0][0][0].argmax(-1) == batch["labels"]).float()
        assert abs(gate.sigmoid().mean() - right.mean()) < 0.8 * abs(0.5 - right.mean())  # from one half, untrained


def test_a_checkpoint_holds_the_ramps_and_one_without_is_refused(tmp_path: Path) -> None:
    def module() -> DistillationModule:
        torch.manual_seed(0)
        return DistillationModule(None, bert(layers=LAYERS))

    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    without = module()
    fit(tmp_path, without, every, max_epochs=1, enable_checkpointing=True)
    bare = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"to hold ramps for the layers \[0, 1\], but it has none"):
        fit(tmp_path, module(), EarlyExit(), ckpt_path=tmp_path / "step=2.ckpt")
    assert not any("ramps" in key for key in bare["state_dict"])

    again = ModelCheckpoint(tmp_path / "ramps", "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = module()
    fit(tmp_path, whole, again, EarlyExit(), max_epochs=1, enable_checkpointing=True)
    resumed = module()
    last = tmp_path / "ramps" / "step=4.ckpt"
    fit(tmp_path, resumed, again, EarlyExit(), max_epochs=1, enable_checkpointing=True, ckpt_path=last)
    assert any("student.ramps.0" in key for key in resumed.state_dict())
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


class Stepping(Module):
    """The same rows on one process and, half of each batch, on two."""

    def __init__(self, model: nn.Module, out: Path) -> None:
        super().__init__(model)
        self.out = out

    def train_dataloader(self) -> Any:
        # Rank r of 2 sees the rows r, r + 2, ...: together the batches that one process sees.
        mine = rows(32)[self.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=8 // self.trainer.world_size)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            for layer in self.net.bert.encoder.layer:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def on_train_end(self) -> None:
        full = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p  # noqa: E731
        weights = {name: full(parameter).detach().clone() for name, parameter in self.named_parameters()}
        torch.save(weights, self.out / f"{self.global_rank}.pt")


@pytest.mark.parametrize("training", ["joint", "alternate", "two_stage"])
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("ddp_fork", marks=pytest.mark.forks),
        pytest.param("ddp_fork_find_unused_parameters_true", marks=pytest.mark.forks),
        "fsdp2",
    ],
)
@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")
def test_sharded_and_parallel_training_equals_that_of_one_process(tmp_path: Path, strategy: str, training: Any) -> None:
    results = []
    for name in (strategy, "auto"):
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(0)
        module = Stepping(bert(layers=LAYERS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), folder)
        chosen: dict[str, Any] = {"strategy": name, "devices": 2 if name.startswith("ddp") else 1}
        if name == "fsdp2":
            chosen["strategy"] = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
        trainer = L.Trainer(
            accelerator="cpu", callbacks=[EarlyExit(training=training)], max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder, use_distributed_sampler=False, **chosen,
        )  # fmt: skip
        trainer.fit(module)
        if name == "fsdp2":
            torch.distributed.destroy_process_group()
        results.append(torch.load(folder / "0.pt", weights_only=True))
    one, other = results
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-4, atol=1e-6)


class Manual(Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False


class NoLabels(Module):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        del batch["labels"]
        return self.net(**batch).logits.sum()


class Nobody(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 2)

    def training_step(self, *_: Any) -> None: ...

    def validation_step(self, *_: Any) -> None: ...

    def configure_optimizers(self) -> None: ...


@pytest.mark.parametrize(
    ("module", "callback", "message"),
    [
        (lambda: Manual(bert(layers=3)), lambda: EarlyExit(), "automatic optimization"),
        (lambda: NoLabels(bert(layers=3)), lambda: EarlyExit(), "`labels` for training='joint'"),
        (lambda: Module(bert(layers=3)), lambda: EarlyExit(exits=[2]), "layers from 0 to 1 of a student of 3 layers"),
        (lambda: Module(bert(layers=3)), lambda: EarlyExit(teacher_weight=0.5), "`teacher_weight` to be 0"),
        (lambda: Module(bert(layers=3)), lambda: EarlyExit(student="model"), "got 'model'"),
        (lambda: Nobody(), lambda: EarlyExit(), r"`student` to be the path .* among \['encoder'\]"),
    ],
)
def test_what_cannot_work_is_said(tmp_path: Path, module: Any, callback: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module(), callback())


class OwnStep(DistillationModule):
    def student_step(self, batch: Any) -> Any:
        return super().student_step(batch)


def test_accumulated_batches_of_a_step_of_the_users_own_train_the_ramps_as_one_batch_does(tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False, "max_epochs": 1}
    found = []
    for accumulate in (1, 3):  # six rows at once, or two by two, where the student runs once more to count
        torch.manual_seed(0)
        models = (
            bert(layers=LAYERS, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) for _ in "ts"
        )
        module = OwnStep(*models, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        run = L.Trainer(callbacks=[EarlyExit(exits=[0, 1])], accumulate_grad_batches=accumulate, **quiet)
        run.fit(module, DataLoader(rows(6), 6 // accumulate))
        found.append([parameter.detach().clone() for parameter in module.parameters()])
    for one, several in zip(*found, strict=True):
        torch.testing.assert_close(one, several)


class FromScratch(DistillationModule):
    """A step of one's own that calls the student by itself."""

    def student_step(self, batch: Any) -> Signals:
        mask = batch["attention_mask"]
        logits = self.student(input_ids=batch["input_ids"], attention_mask=mask).logits
        return Signals(logits, batch["labels"], token_mask=mask.bool())


def test_what_ramps_learn_are_objectives_of_the_fit_alone(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class See(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            assert "training_step" not in vars(pl_module)
            seen.append(set(pl_module.objectives))

    runs = []
    for kind in (DistillationModule, FromScratch):
        torch.manual_seed(0)
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        module = kind(*(bert(layers=LAYERS, num_labels=2, **still) for _ in "ts"))
        trainer = fit(tmp_path, module, EarlyExit(criterion=LearnedGate(), teacher_weight=0.3), See())
        assert set(module.objectives) == {"soft_target", "hard_label"}
        runs.append((module, trainer.callback_metrics))
    assert seen[0] == {"soft_target", "hard_label", "ramps_hard_label", "ramps_soft_target", "ramps_gate"}
    (one, logged), (other, _) = runs
    parts = 0.7 * logged["train_ramps_hard_label"] + 0.3 * logged["train_ramps_soft_target"]
    torch.testing.assert_close(logged["train_ramps_loss"], parts + logged["train_ramps_gate"])
    own = 0.7 * logged["val_soft_target"] + 0.3 * logged["val_hard_label"]
    torch.testing.assert_close(logged["val_loss"], own)
    assert not [name for name in logged if name.startswith("val_ramps")]
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor)


class AddsByItself(Module):
    """What EarlyExit does, written out by hand."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        output = self.net(**batch, output_hidden_states=True)
        loss: Tensor = output.loss
        for layer, state in enumerate(output.hidden_states[1:-1]):
            logits, _ = self.net.ramps.ask(layer, state, batch["attention_mask"].bool())
            loss = loss + (layer + 1) / LAYERS * nn.functional.cross_entropy(logits, batch["labels"])
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Alone(AddsByItself):
    training_step = Module.training_step  # type: ignore[assignment]


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_any_module_trains_as_one_that_adds_the_ramps_loss_by_itself(
    tmp_path: Path, accumulate: int, scale: float | None
) -> None:
    found = []
    for kind in (Alone, AddsByItself):
        torch.manual_seed(0)
        net = bert(layers=LAYERS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        callbacks = [EarlyExit(loss_weights="depth")]
        if kind is AddsByItself:
            net.ramps = make_ramps(net)
            callbacks = []
        plugins: list[Any] = []
        if scale is not None:
            plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]
        module = kind(net)
        fit(tmp_path, module, *callbacks, accumulate_grad_batches=accumulate, plugins=plugins)
        found.append(module.state_dict())
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=1e-4, atol=1e-6)
