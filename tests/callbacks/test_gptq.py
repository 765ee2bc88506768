import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillationModule
from lightning_distill.callbacks import GPTQ
from lightning_distill.objectives import HiddenState, SoftTarget
from lightning_distill.quantization import QuantLinear, load
from lightning_distill.quantization.finished import FinishedLayers
from tests.helpers.models import batch, bert

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers", "ignore:.*logging interval", "ignore:GPU available"
)


class Module(L.LightningModule):
    """Finds the largest of 32 inputs."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.student = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.student(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.student(batch[0])
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean(), sync_dist=True)
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]), sync_dist=True)

    def train_dataloader(self) -> DataLoader:
        inputs = torch.randn(256, 32, generator=torch.Generator().manual_seed(5))
        return DataLoader(TensorDataset(inputs, inputs.argmax(1)), batch_size=32)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def trainer(folder: Path, *callbacks: L.Callback, **arguments: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    return L.Trainer(**{**defaults, "default_root_dir": folder, "callbacks": list(callbacks), **arguments})


def fit(folder: Path, callback: GPTQ, **arguments: Any) -> Module:
    module = Module()
    trainer(folder, callback, **arguments).fit(module)
    return module


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "student-gptq" / "gptq.json").read_text())


@pytest.mark.forks
def test_two_processes_quantise_one_student_and_both_validate_it(tmp_path: Path) -> None:
    callback = GPTQ(group_size=32, num_samples=128, max_drop=0.5)
    module = fit(tmp_path, callback, strategy="ddp_fork", devices=2, max_epochs=6)
    found = written(tmp_path)
    assert found["kept"] is True
    assert found["metric_before"] > 0.5
    # The process that called fit gets weights alone back, so its student stays as it is.
    assert isinstance(module.student[0], nn.Linear)
    inputs, labels = module.train_dataloader().dataset.tensors
    answers = load(tmp_path / "student-gptq", Module().student)(inputs)
    assert found["metric"] == pytest.approx(float((answers.argmax(1) == labels).float().mean()), abs=1e-6)


class Fails(GPTQ):
    def _quantize(self, *args: Any) -> nn.Module:
        raise ValueError("no quantised student today")


@pytest.mark.forks
def test_what_fails_on_rank_0_ends_all_processes(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no quantised student today"):
        fit(tmp_path, Fails(group_size=32), strategy="ddp_fork", devices=2)
    assert (tmp_path / "student" / "model.safetensors").exists()


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_kill_in_the_middle_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    save = FinishedLayers.save

    def save_and_note(self: FinishedLayers, name: str, *args: Any) -> None:
        save(self, name, *args)
        saved.append(name)
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(FinishedLayers, "save", save_and_note)
    parent, folder = os.getpid(), tmp_path / "checkpoints"
    child = os.fork()
    if child == 0:
        trainer(tmp_path, GPTQ(group_size=32), ModelCheckpoint(folder, save_last=True), enable_checkpointing=True).fit(
            Module()
        )
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.name for path in (tmp_path / "student-gptq-layers").glob("*.safetensors")] == ["0.safetensors"]
    assert (tmp_path / "student" / "model.safetensors").exists()
    module = Module()
    trainer(tmp_path, GPTQ(group_size=32)).fit(module, ckpt_path=folder / "last.ckpt")
    assert saved == ["2"]
    assert isinstance(module.student[0], QuantLinear)
    assert [layer["name"] for layer in written(tmp_path)["layers"]] == ["0", "2"]
    assert not (tmp_path / "student-gptq-layers").exists()


def test_student_is_quantised_measured_and_written(tmp_path: Path) -> None:
    callback = GPTQ(bits=4, group_size=32, max_drop=0.5)
    module = fit(tmp_path, callback, logger=CSVLogger(tmp_path, "logs", ""), log_every_n_steps=1)
    assert isinstance(module.student[0], QuantLinear)
    found = written(tmp_path)
    assert found["metric_before"] > 0.5
    assert found["metric_before"] - found["metric"] <= 0.5
    assert [layer["name"] for layer in found["layers"]] == ["0", "2"]
    assert found["bytes"] == (tmp_path / "student-gptq" / "model.safetensors").stat().st_size
    assert (tmp_path / "student-gptq" / "gptq.png").stat().st_size > 5000
    loaded = load(tmp_path / "student-gptq", Module().student)
    assert torch.equal(loaded(torch.ones(1, 32)), module.student(torch.ones(1, 32)))
    header, *rows = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    assert {"gptq_val_accuracy", "gptq_drop"} <= set(header.split(","))
    place = header.split(",").index("val_accuracy")
    assert sum(bool(row.split(",")[place]) for row in rows) == 3  # one an epoch: what training looked like


def test_progress_over_layers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit(tmp_path, GPTQ(group_size=32, max_drop=None), enable_progress_bar=True, max_epochs=1)
    assert "GPTQ: 100%" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    callback = GPTQ(group_size=32, max_drop=0.5)
    module = fit(tmp_path, callback, accelerator="gpu", devices=1)
    assert isinstance(module.student[0], QuantLinear)
    inputs = torch.randn(8, 32)
    expected = module.student(inputs)
    torch.testing.assert_close(module.student.cuda()(inputs.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


def test_validate_quantises_once(tmp_path: Path) -> None:
    module = Module()
    trainer(tmp_path).fit(module)
    callback = GPTQ(group_size=32, max_drop=0.5)
    validating = trainer(tmp_path, callback)
    validating.validate(module, verbose=False)
    assert isinstance(module.student[0], QuantLinear)
    layer = module.student[0]
    validating.validate(module, verbose=False)
    assert module.student[0] is layer
    assert written(tmp_path)["metric_before"] > 0.5


def test_too_large_a_drop_keeps_the_float_student_and_names_layers(tmp_path: Path, caplog: Any) -> None:
    callback = GPTQ(bits=2, group_size=-1, max_drop=-1.0)
    with caplog.at_level("INFO"):
        module = fit(tmp_path, callback)
    assert isinstance(module.student[0], nn.Linear)
    assert callback.summary["kept"] is False
    assert "Worst: " in caplog.text


@pytest.mark.parametrize(
    ("arguments", "bits"),
    [
        ({"sensitive_layers": 1}, {8, 2}),
        ({"sensitive_layers": 1, "sensitive_bits": 0}, {0, 2}),
        ({"budget_bytes": 8_000}, {8}),
        ({"budget_bytes": 4_800}, {8, 2}),
    ],
    ids=str,
)
def test_the_most_sensitive_layers_get_more_bits(tmp_path: Path, arguments: dict, bits: set) -> None:
    settings = {"bits": 2, "group_size": 32, "monitor": "val_loss", "mode": "min"}
    plain = GPTQ(**settings, max_drop=None, folder=str(tmp_path / "plain"))
    fit(tmp_path, plain)
    drop = plain.summary["metric"] - plain.summary["metric_before"]
    assert drop > 0
    callback = GPTQ(**settings, max_drop=0.95 * drop, **arguments)
    module = fit(tmp_path, callback)
    assert callback.summary["kept"] is True
    assert callback.summary["metric"] < plain.summary["metric"]
    assert {layer.bits for layer in callback.report} == bits
    assert any(isinstance(layer, QuantLinear) for layer in module.student)
    assert callback.summary["bytes"] <= arguments.get("budget_bytes", 1e9)


def test_distillation_with_captured_signals(tmp_path: Path) -> None:
    data = [batch("classification", 16, seed=seed) for seed in range(8)]
    config = {"hidden_size": 32, "intermediate_size": 64, "hidden_dropout_prob": 0.0}
    objectives = [SoftTarget(), HiddenState(weight=0.1)]
    module = DistillationModule(bert(layers=4, **config), bert(layers=2, **config), objectives)
    trainer(tmp_path, GPTQ(group_size=32, max_drop=None), max_epochs=1).fit(
        module, DataLoader(data, batch_size=None), DataLoader(data, batch_size=None)
    )
    query = module.student.bert.encoder.layer[0].attention.self.query
    assert isinstance(query, QuantLinear)
    assert isinstance(module.teacher.bert.encoder.layer[0].attention.self.query, nn.Linear)
    loaded = load(tmp_path / "student-gptq")
    inputs = {key: value for key, value in data[0].items() if key != "labels"}
    assert torch.equal(loaded(**inputs).logits, module.student.eval()(**inputs).logits)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.student.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"group_size": 7}, "group_size"),
        ({"calibration": "test"}, "calibration"),
        ({"num_samples": 0}, "num_samples"),
        ({"asymmetric": True, "true_sequential": False}, "asymmetric"),
        ({"asymmetric": True, "sensitive_layers": 1}, "`asymmetric` to be off beside `sensitive_layers`"),
        ({"sensitive_layers": 1, "monitor": None}, "sensitive_layers"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTQ(**arguments)


def test_a_metric_that_is_not_logged_is_said_after_the_first_validation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_accuracy"):
        fit(tmp_path, GPTQ(monitor="val_f1"))
    assert not (tmp_path / "student").exists()
    with pytest.raises(ValueError, match="without validation"):
        fit(tmp_path, GPTQ(), limit_val_batches=0)


def test_a_module_or_a_strategy_that_cannot_be_quantised_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`teacher`"):
        fit(tmp_path, GPTQ(attribute="teacher"))
    sharded = trainer(tmp_path, strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="ModelParallelStrategy"):
        GPTQ().setup(sharded, Module(), "fit")
