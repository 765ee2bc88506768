"""What every callback must stand: checkpoints, resuming after any step, two processes, mixed precision, YAML."""

import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_distill import callbacks
from tests.callbacks.registry import ROWS, Regression, Row, same, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Expected at least as many calibration tokens"),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def test_every_public_callback_is_in_the_registry() -> None:
    assert {row.callback.__name__ for row in ROWS} == set(callbacks.__all__)


def checkpoint(folder: Path, step: int) -> dict[str, Any]:
    return torch.load(folder / f"step={step}.ckpt", weights_only=True)  # type: ignore[no-any-return]


def without_folders(state: dict[str, Any]) -> dict[str, Any]:
    """Callback states but those of checkpointing, which hold file names."""
    return {key: value for key, value in state.items() if "ModelCheckpoint" not in key}


@every_row
def test_state_goes_through_a_checkpoint(row: Row, tmp_path: Path) -> None:
    callback = row.build(tmp_path)
    trainer(tmp_path, callback).fit(row.module())
    state = callback.state_dict()
    assert same(checkpoint(tmp_path, 5)["callbacks"].get(callback.state_key, {}), state)
    fresh = row.build(tmp_path)
    fresh.load_state_dict(state)
    assert same(fresh.state_dict(), state)


class Kill(L.Callback):
    """Kills the process before it begins the step after one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.forks
@every_row
def test_a_run_killed_after_any_step_and_resumed_equals_the_run_without_a_break(row: Row, tmp_path: Path) -> None:
    trainer(tmp_path / "whole", row.build(tmp_path)).fit(row.module())
    whole = checkpoint(tmp_path / "whole", 5)
    for step in range(1, 5):
        broken, folder = tmp_path / f"broken {step}", tmp_path / f"from {step}"
        run = trainer(broken, row.build(tmp_path), Kill(step))
        child = multiprocessing.get_context("fork").Process(target=run.fit, args=(row.module(),))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        trainer(folder, row.build(tmp_path)).fit(row.module(), ckpt_path=broken / f"step={step}.ckpt")
        resumed = checkpoint(folder, 5)
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert same(resumed[part], whole[part]), f"{part} after a break at step {step}"
        assert same(without_folders(resumed["callbacks"]), without_folders(whole["callbacks"]))


@pytest.mark.forks
@every_row
def test_two_processes_equal_one(row: Row, tmp_path: Path) -> None:
    trainer(tmp_path / "one", row.build(tmp_path)).fit(row.module())
    trainer(tmp_path / "two", row.build(tmp_path), strategy="ddp_fork", devices=2).fit(row.module())
    one, two = checkpoint(tmp_path / "one", 5), checkpoint(tmp_path / "two", 5)
    assert same(two["state_dict"], one["state_dict"], rtol=1e-4)
    assert all((two["state_dict"][name] - weight).abs().max() < 1e-6 for name, weight in one["state_dict"].items())
    assert same(without_folders(two["callbacks"]), without_folders(one["callbacks"]), rtol=1e-4)


@every_row
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_trains_as_full_precision_does(
    row: Row, precision: Literal["bf16-mixed", "16-mixed"], tmp_path: Path
) -> None:
    full, mixed = row.module(), row.module()
    start = {name: weight.detach().clone() for name, weight in full.named_parameters() if weight.requires_grad}
    trainer(tmp_path / "full", row.build(tmp_path / "of_full")).fit(full)
    # As a plugin, because the Trainer turns 16-mixed into bf16-mixed on a CPU.
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if precision == "16-mixed" else None
    plugin = MixedPrecision(precision, "cpu", scaler)
    trainer(tmp_path / "mixed", row.build(tmp_path / "of_mixed"), plugins=plugin).fit(mixed)
    for (name, wanted), got in zip(full.named_parameters(), mixed.parameters(), strict=True):
        # A callback may add parameters; those that there were must have moved.
        assert name not in start or not torch.equal(start.pop(name), got)
        torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.02)
    assert not start


@every_row
def test_lightning_cli_builds_it_from_yaml(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"lightning_distill.callbacks.{row.callback.__name__}"
    settings = {"accelerator": "cpu", "logger": False, "callbacks": [{"class_path": path, "init_args": row.arguments}]}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": settings}))
    monkeypatch.setattr("sys.argv", ["train"])
    cli = LightningCLI(Regression, args=["--config", str(config)], run=False, seed_everything_default=0)
    (built,) = [callback for callback in cli.trainer.callbacks if type(callback) is row.callback]
    for name, value in row.arguments.items():
        assert getattr(built, name) == value


@pytest.mark.parametrize(("row", "bad"), [pytest.param(row, bad, id=f"{row}-{bad}") for row in ROWS for bad in row.bad])
def test_a_bad_argument_is_refused_by_name(row: Row, bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises((ValueError, TypeError), match=re.escape(f"Expected argument `{name}`")):
        row.build(**bad)
