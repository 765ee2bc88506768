"""What torchrun starts on each node in training/test_torchrun.py: distil; write where it ran, the weights once."""

import socket
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillationModule

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")


def fit(num_nodes: int, precision: Any, max_steps: int = 20) -> DistillationModule:
    """Twenty steps of eight rows, shared by the nodes."""
    L.seed_everything(0, verbose=False)
    teacher, student = (
        torch.nn.Sequential(torch.nn.Linear(4, w), torch.nn.Tanh(), torch.nn.Linear(w, 3)) for w in (16, 8)
    )
    module = DistillationModule(teacher, student, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    data = TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    given: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        # As a plugin, because the Trainer turns the flag into bf16-mixed on a CPU.
        given = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, num_nodes=num_nodes, strategy="ddp" if num_nodes > 1 else "auto",
        max_steps=max_steps,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **given,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=8 // num_nodes))
    return module


if __name__ == "__main__":
    weights = {}
    for precision in PRECISIONS:
        module = fit(2, precision)
        weights[precision] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    strategy = module.trainer.strategy
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((sys.argv[2], 9))
        address = probe.getsockname()[0]
    (Path(sys.argv[1]) / f"{strategy.global_rank} of {strategy.world_size}").write_text(address)
    if strategy.global_rank == 0:
        torch.save(weights, Path(sys.argv[1]) / "weights.pt")
