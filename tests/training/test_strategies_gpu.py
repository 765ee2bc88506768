"""The strategies that need a GPU, and how a CPU is refused."""

from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.deepspeed import _DEEPSPEED_AVAILABLE
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillationModule
from lightning_distill.training.parallel import tensor_parallel
from tests.helpers.models import llama
from tests.training.test_strategies import STEPS, Rows, largest_difference, shards, still, weights

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")


def test_what_is_refused_on_a_cpu() -> None:
    for strategy in ("fsdp", FSDPStrategy()):
        with pytest.raises(ValueError, match="The strategy `fsdp` requires a GPU accelerator"):
            L.Trainer(accelerator="cpu", strategy=strategy)
    if not _DEEPSPEED_AVAILABLE:
        with pytest.raises(MisconfigurationException, match="you must have DeepSpeed installed"):
            L.Trainer(accelerator="cpu", strategy="deepspeed_stage_2")
    with pytest.raises(ValueError, match=r"does not support .*precision='16-mixed'"):
        L.Trainer(accelerator="gpu" if torch.cuda.is_available() else "auto", strategy=shards(), precision="16-mixed")


def test_a_model_without_a_plan_and_heads_that_do_not_divide_are_refused() -> None:
    mesh = mock.Mock(**{"size.return_value": 2})
    with pytest.raises(ValueError, match="transformers has a tensor-parallel plan for"):
        tensor_parallel(still(2), mesh)
    with pytest.raises(ValueError, match="`num_key_value_heads`, but got 2 and 1"):
        tensor_parallel(llama(num_key_value_heads=1), mesh)


@pytest.mark.gpu
@needs_gpu
def test_batch_norm_synced_is_that_of_one_process(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    results = []
    for devices, size in ((1, 8), (2, 4)):
        torch.manual_seed(0)
        nets = [nn.Sequential(nn.Linear(4, w), nn.BatchNorm1d(w), nn.ReLU(), nn.Linear(w, 3)) for w in (16, 8)]
        module = DistillationModule(nets[0], nets[1], optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        rows = DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 3), batch_size=size)
        run = L.Trainer(accelerator="gpu", devices=devices, strategy="ddp_fork", sync_batchnorm=True, max_steps=STEPS)
        run.fit(module, rows)
        results.append(weights(module))
    assert largest_difference(*results) < 1e-5


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_one_gpu_trains_as_the_cpu_does(strategy: str, tmp_path: Path) -> None:
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed")
        chosen: Any = DeepSpeedStrategy(stage=2, exclude_frozen_parameters=True)
    else:
        chosen = FSDPStrategy(auto_wrap_policy={type(still(2).bert.encoder.layer[0])})  # type: ignore[union-attr]
    losses = []
    for settings in ({"accelerator": "cpu"}, {"accelerator": "gpu", "strategy": chosen}):
        torch.manual_seed(0)
        module = DistillationModule(still(3), still(2), optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
        run = L.Trainer(devices=1, max_steps=STEPS, log_every_n_steps=1, default_root_dir=tmp_path, **settings)
        run.fit(module, datamodule=Rows("token_classification", 7))
        losses.append(run.callback_metrics["train_loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)  # a GPU may multiply in TF32
    assert not any(p.requires_grad for p in module.teacher.parameters())
    run.save_checkpoint(tmp_path / "saved.ckpt")
    if strategy == "fsdp":
        saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
        assert not [key for key in saved if "teacher" in key]


@pytest.mark.gpu
@needs_gpu
def test_deepspeed_that_would_save_the_teacher_is_refused() -> None:
    pytest.importorskip("deepspeed")
    module = DistillationModule(still(3), still(2))
    with pytest.raises(ValueError, match="exclude_frozen_parameters=True"):
        L.Trainer(accelerator="gpu", devices=1, strategy=DeepSpeedStrategy(stage=2)).fit(
            module, datamodule=Rows("token_classification", 7)
        )
