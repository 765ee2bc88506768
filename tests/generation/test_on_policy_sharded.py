"""On-policy distillation under FSDP2: ranks write texts of other lengths with one model, and none waits for ever."""

import os
import socket
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_distill.generation import OnPolicyDistillation
from lightning_distill.objectives import SoftTarget
from tests.generation.test_on_policy import Data
from tests.helpers.models import llama


class Sharded(OnPolicyDistillation):
    """Every layer of the student is cut over the processes."""

    lengths: list[int]

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.student.model.layers:  # type: ignore[union-attr, operator]
            fully_shard(layer, mesh=mesh)
        fully_shard(self.student, mesh=mesh)

    def write(self, batch: Any, seed: int) -> dict[str, torch.Tensor]:
        written = super().write(batch, seed)
        self.lengths.append(int((written["labels"] != -100).sum(-1).max()))
        return written


def process(rank: int, port: int, folder: Path) -> None:
    elastic = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    elastic |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in elastic.items()}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Sharded(
        llama(layers=3),
        llama(initializer_range=0.3),  # sure of itself, so that texts end early, at different tokens
        [SoftTarget(1.0)],
        on_policy=1.0,
        prompt_length=3,
        max_new_tokens=20,
        sampling_temperature=2.0,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    module.lengths = []
    L.Trainer(
        accelerator="cpu", devices=2, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, default_root_dir=folder,
    ).fit(module, datamodule=Data(batch_size=1))  # fmt: skip
    weights = {name: value.full_tensor().detach() for name, value in module.student.named_parameters()}
    torch.save({"lengths": module.lengths, "weights": weights}, folder / f"{rank}.pt")


@pytest.mark.forks
def test_ranks_with_texts_of_different_lengths_train_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(process, (port, tmp_path), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(ranks[0]["lengths"]) == 6
    assert ranks[0]["lengths"] != ranks[1]["lengths"]
    for name, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][name])
        assert bool(torch.isfinite(value).all())
