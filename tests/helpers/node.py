"""What torchrun starts on each node in tests/test_torchrun.py: distil, write where it ran, and the weights once."""

import socket
import sys
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillationModule


def fit(num_nodes: int) -> DistillationModule:
    """Twenty steps of eight rows, shared by the nodes."""
    L.seed_everything(0, verbose=False)
    teacher, student = (
        torch.nn.Sequential(torch.nn.Linear(4, w), torch.nn.Tanh(), torch.nn.Linear(w, 3)) for w in (16, 8)
    )
    module = DistillationModule(teacher, student, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    data = TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, num_nodes=num_nodes, strategy="ddp" if num_nodes > 1 else "auto", max_steps=20,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=8 // num_nodes))
    return module


if __name__ == "__main__":
    module = fit(num_nodes=2)
    strategy = module.trainer.strategy
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((sys.argv[2], 9))
        address = probe.getsockname()[0]
    (Path(sys.argv[1]) / f"{strategy.global_rank} of {strategy.world_size}").write_text(address)
    if strategy.global_rank == 0:
        torch.save(module.state_dict(), Path(sys.argv[1]) / "weights.pt")
