import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill.callbacks import GPTQ
from lightning_distill.quantization import QuantLinear, load

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers", "ignore:.*logging interval", "ignore:GPU available"
)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.student(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self.student(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(folder: Path, callback: GPTQ) -> Module:
    inputs = torch.randn(256, 32)
    loader = DataLoader(TensorDataset(inputs, inputs.argmax(1)), batch_size=32)
    module = Module()
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    return module


def test_student_is_quantised_measured_and_written(tmp_path: Path) -> None:
    callback = GPTQ(bits=4, group_size=32, monitor="val_accuracy", max_drop=0.5)
    module = fit(tmp_path, callback)
    assert isinstance(module.student[0], QuantLinear)
    written = json.loads((tmp_path / "gptq" / "gptq.json").read_text())
    assert written["metric_before"] > 0.5
    assert written["metric_before"] - written["metric"] <= 0.5
    assert [layer["name"] for layer in written["layers"]] == ["0", "2"]
    assert written["bytes"] == (tmp_path / "gptq" / "gptq" / "model.safetensors").stat().st_size
    assert (tmp_path / "gptq" / "gptq.png").stat().st_size > 5000
    loaded = load(tmp_path / "gptq" / "gptq", Module().student)
    assert torch.equal(loaded(torch.ones(1, 32)), module.student(torch.ones(1, 32)))


def test_too_large_a_drop_keeps_the_float_student(tmp_path: Path) -> None:
    callback = GPTQ(bits=2, group_size=-1, monitor="val_accuracy", max_drop=-1.0)
    module = fit(tmp_path, callback)
    assert isinstance(module.student[0], nn.Linear)
    assert callback.summary["kept"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"group_size": 7}, "group_size"),
        ({"calibration": "test"}, "calibration"),
        ({"num_samples": 0}, "num_samples"),
        ({"max_drop": 0.1}, "monitor"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTQ(**arguments)


def test_a_metric_that_is_not_logged_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_accuracy"):
        fit(tmp_path, GPTQ(monitor="val_f1"))
