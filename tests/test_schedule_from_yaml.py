"""A schedule of the module from YAML or flags: any of torch's, by step or epoch, and plateaus with what they watch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule
from torch import nn

from lightning_distill import DistillationModule

# Lightning's CLI calls jsonargparse in ways that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
LINEAR = "{class_path: torch.nn.Linear, init_args: {in_features: 32, out_features: 2}}"
CONFIG = f"""
model:
  teacher: {LINEAR}
  student: {LINEAR}
  objectives: [{{class_path: lightning_distill.objectives.SoftTarget}}]
  optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
trainer: {{max_epochs: 2, limit_train_batches: 3, limit_val_batches: 1, accelerator: cpu, logger: false,
  enable_checkpointing: false, enable_progress_bar: false, enable_model_summary: false}}
"""


def trained(folder: Path, *flags: str) -> Any:
    """The learning rate after two epochs of three steps."""
    (folder / "config.yaml").write_text(CONFIG)
    arguments = ["fit", f"--config={folder / 'config.yaml'}", f"--trainer.default_root_dir={folder}", *flags]
    cli = LightningCLI(
        DistillationModule, BoringDataModule, args=arguments, seed_everything_default=0, save_config_callback=None
    )
    return cli.trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["StepLR", "step_size=1"], 0.001),
        (["torch.optim.lr_scheduler.ExponentialLR", "gamma=0.5", "lr_scheduler_interval=step"], 0.1 * 0.5**6),
        (["OneCycleLR", "max_lr=0.1", "total_steps=7", "lr_scheduler_interval=step"], 4e-7),
        (
            [
                "torch.optim.lr_scheduler.ReduceLROnPlateau",
                "threshold=10",
                "patience=0",
                "lr_scheduler_monitor=val_loss",
            ],
            0.001,
        ),
        (["lightning.pytorch.cli.ReduceLROnPlateau", "monitor=val_loss", "threshold=10", "patience=0"], 0.001),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_any_schedule_of_torch(
    flags: list[str], wanted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])  # pytest's own words are none of the command's
    kind, *options = flags
    scoped = [f"--model.{o}" if o.startswith("lr_sch") else f"--model.lr_scheduler.{o}" for o in options]
    assert trained(tmp_path, f"--model.lr_scheduler={kind}", *scoped) == pytest.approx(wanted)


def test_a_plateau_of_nothing_is_refused() -> None:
    module = DistillationModule(
        nn.Linear(2, 2), nn.Linear(2, 2), lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau
    )
    with pytest.raises(ValueError, match="`lr_scheduler_monitor` to be the name of a logged metric"):
        module.configure_optimizers()
