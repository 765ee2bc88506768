"""What holds for any tensor: its precision, and its parts where a strategy has spread it over processes."""

from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def full_precision(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def whole(x: Tensor) -> Tensor:
    """The whole value, joined where processes hold shards of it, which is a collective call."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: T) -> T:
    """This process's part of a ``DTensor``; anything else as it is."""
    return x.to_local() if isinstance(x, DTensor) else x  # type: ignore[return-value]


def fill_(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter; of a ``DTensor`` each process fills its own shard.

    Args:
        parameter: Where to.
        value: Of the parameter's whole shape, the same on every rank.
    """
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    parameter.detach().copy_(value)
