"""Two processes that a Trainer takes for two of torchrun's, in which any number of fits run one after another."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_pair(work: Callable[[Path], None], folder: Path) -> None:
    """Fork two processes with torchrun's environment; each calls ``work(folder)``.

    Args:
        work: Called in each process; what it finds, it writes into the folder.
        folder: For results.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_process, (port, work, folder), nprocs=2, start_method="fork")


def _process(rank: int, port: int, work: Callable[[Path], None], folder: Path) -> None:
    elastic: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2}
    elastic |= {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in elastic.items()}
    torch.set_num_threads(1)
    work(folder)
