"""GradientClipping under FSDP2: two gloo processes that each hold half of every parameter equal one process."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_distill.callbacks import GradientClipping
from tests.callbacks.registry import Regression, same, trainer

pytestmark = [
    pytest.mark.forks,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]
ALGORITHMS: list[dict[str, Any]] = [
    {"algorithm": "norm", "threshold": 0.1},
    {"algorithm": "value", "threshold": 0.01},
    {"algorithm": "adaptive", "threshold": 0.02, "exclude": "head.*"},
    {"algorithm": "percentile", "threshold": 50.0, "per": "parameter_group", "history": 4},
    {"algorithm": "zscore", "threshold": 0.5, "warmup_steps": 2},
]


class Sharded(Regression):
    """Every layer's parameters are cut over the processes; 17 rows do not divide by two."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.body = nn.Sequential(nn.Linear(4, 17), nn.Tanh(), nn.Linear(17, 32), nn.Tanh())

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for layer in (self.body[0], self.body[2], self.head):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.body, mesh=self.device_mesh["data_parallel"])


def fit(folder: Path, arguments: dict[str, Any], **settings: Any) -> dict[str, Any]:
    callback, module = GradientClipping(**arguments), Sharded()
    trainer(folder, callbacks=callback, enable_checkpointing=False, **settings).fit(module)
    weights = {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
        for name, weight in module.named_parameters()
    }
    return {"weights": weights, "state": callback.state_dict()}


def process(rank: int, port: int, folder: Path) -> None:
    elastic = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    elastic |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in elastic.items()}
    torch.set_num_threads(1)
    for index, arguments in enumerate(ALGORITHMS):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        result = fit(folder, arguments, devices=2, strategy=strategy)
        if rank == 0:
            torch.save(result, folder / f"{index}.pt")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(process, (port, folder), nprocs=2, start_method="fork")
    return folder


@pytest.mark.parametrize("index", range(len(ALGORITHMS)), ids=[str(a["algorithm"]) for a in ALGORITHMS])
def test_two_processes_with_half_of_every_parameter_equal_one(sharded: Path, index: int, tmp_path: Path) -> None:
    two = torch.load(sharded / f"{index}.pt", weights_only=True)
    one = fit(tmp_path, ALGORITHMS[index])
    assert one["state"]["statistics"][0]["clipped"].sum() > 0
    assert same(two["weights"], one["weights"], rtol=1e-4)
    assert same(two["state"], one["state"], rtol=1e-4)
