"""InitPolicy under FSDP2: two gloo processes with half of every parameter hold what one process draws."""

import os
import socket
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_distill.callbacks import InitPolicy
from tests.callbacks.registry import Regression, trainer

pytestmark = pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
PLACES = ("constructor", "meta", "configure_model")


class Sharded(Regression):
    """Every layer cut over the processes, built in the constructor, on the meta device, or in `configure_model`."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, body, head = where, self.body, self.head
        del self.body, self.head
        if where == "constructor":
            self.body, self.head = body, head
        elif where == "meta":
            self.body, self.head = body.to("meta"), head.to("meta")

    def configure_model(self) -> None:
        if self.where == "configure_model":
            with torch.device("meta"):
                whole = Regression()
            self.body, self.head = whole.body.to("meta"), whole.head.to("meta")
        for layer in (self.body[0], self.body[2], self.head):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.body, mesh=self.device_mesh["data_parallel"])


class AsBefore(L.Callback):
    """Compares the weights after a checkpoint was loaded with those that were saved."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights, self.looked = weights, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.looked = True
        for name, weight in pl_module.named_parameters():
            assert torch.equal(weight.full_tensor(), self.weights[name]), name


def strategy() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def process(rank: int, port: int, folder: Path) -> None:
    elastic = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    elastic |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in elastic.items()}
    torch.set_num_threads(1)
    for where in PLACES:
        policy, module = InitPolicy(output_dir=folder / where), Sharded(where)
        run = trainer(folder, callbacks=[policy], enable_checkpointing=False, devices=2, strategy=strategy())
        run.fit(module)
        weights = {name: weight.full_tensor().detach().clone() for name, weight in module.named_parameters()}
        if rank == 0:
            torch.save(weights, folder / f"{where}.pt")
    # Where the checkpoint is loaded after the last draw: its weights hold, and nothing is said of a draw.
    run.save_checkpoint(folder / "sharded.ckpt")
    policy, look = InitPolicy(output_dir=folder / "resumed"), AsBefore(weights)
    again = trainer(
        folder, callbacks=[look, policy], enable_checkpointing=False, devices=2, strategy=strategy(), max_steps=6
    )
    again.fit(Sharded(where), ckpt_path=folder / "sharded.ckpt")
    assert look.looked
    assert policy.audit == []
    assert not (folder / "resumed").exists()


@pytest.mark.forks
def test_shards_hold_what_one_process_draws(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(process, (port, tmp_path), nprocs=2, start_method="fork")
    module = Regression()
    trainer(tmp_path, callbacks=[InitPolicy()], enable_checkpointing=False).fit(module)
    for where in PLACES:
        two = torch.load(tmp_path / f"{where}.pt", weights_only=True)
        for name, weight in module.named_parameters():
            torch.testing.assert_close(two[name], weight.detach(), rtol=1e-4, atol=1e-5)
        assert (tmp_path / where / "init_policy.png").exists()
