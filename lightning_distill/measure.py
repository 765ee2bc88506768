"""Numbers about a model: parameters, bytes on disk, latency side by side."""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from lightning_distill.models.calling import call_model
from lightning_distill.models.exporting import write_model


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; a tied one counts once.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.measure import count_parameters
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Bytes of the safetensors files that :func:`lightning_distill.models.pretrained.export` writes for a model."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, Path(folder))
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def latency_ms(
    models: Mapping[str, nn.Module],
    batches: Sequence[Any],
    *,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, float]:
    """Median time of one forward, in milliseconds, of several models on the same batches.

    The models take turns on each batch, so that a machine that slows down slows all of them. Each runs in eval under
    ``inference_mode``, after one forward that is not counted; on a GPU the device is synchronised around each forward.

    Args:
        models: The models by name; each keeps its train or eval mode, and is moved to ``device``.
        batches: What the models are called with, as in training.
        repeats: How many times each batch is run.
        device: Where to measure.
        progress: Whether to show a bar on stderr.

    Returns:
        The median by name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.measure import latency_ms
        >>> wide = nn.Sequential(nn.Linear(8, 4096), nn.Linear(4096, 8))
        >>> times = latency_ms({"narrow": nn.Linear(8, 8), "wide": wide}, [torch.randn(32, 8)])
        >>> times["narrow"] < times["wide"]
        True
    """
    times = _times(models, batches, repeats, device, progress)
    return {name: 1000 * statistics.median(chain.from_iterable(per_batch)) for name, per_batch in times.items()}


def throughput(
    models: Mapping[str, nn.Module],
    batches: Sequence[Any],
    *,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, float]:
    """Rows per second of several models on the same batches, which may take different times.

    A batch's time is the median over the repeats; see :func:`latency_ms` for the rest.

    Args:
        models: The models by name.
        batches: What the models are called with; the first tensor of each has its rows first.
        repeats: How many times each batch is run.
        device: Where to measure.
        progress: Whether to show a bar on stderr.

    Returns:
        Rows per second by name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.measure import throughput
        >>> wide = nn.Sequential(nn.Linear(8, 4096), nn.Linear(4096, 8))
        >>> rates = throughput({"narrow": nn.Linear(8, 8), "wide": wide}, [torch.randn(32, 8)])
        >>> rates["narrow"] > rates["wide"]
        True
    """
    times = _times(models, batches, repeats, device, progress)
    rows = sum(len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))) for batch in batches)
    return {name: rows / sum(map(statistics.median, per_batch)) for name, per_batch in times.items()}


def _times(
    models: Mapping[str, nn.Module], batches: Sequence[Any], repeats: int, device: torch.device | str, progress: bool
) -> dict[str, list[list[float]]]:
    """Seconds of each model, batch and repeat."""
    batches = [move_data_to_device(batch, device) for batch in batches]
    modes = {name: model.training for name, model in models.items()}
    times: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in models}
    for model in models.values():
        model.eval().to(device)  # outside of inference mode, where the int8 weights of torchao cannot be moved
    total = len(models) * len(batches) * repeats
    with torch.inference_mode(), tqdm(total=total, desc="Measuring time", leave=False, disable=not progress) as bar:
        for model in models.values():
            _timed(model, batches[0])
        for _ in range(repeats):
            for index, batch in enumerate(batches):
                for name, model in models.items():
                    times[name][index].append(_timed(model, batch))
                    bar.update()
    for name, model in models.items():
        model.train(modes[name])
    return times


def _timed(model: nn.Module, batch: Any) -> float:
    device = next(model.parameters()).device
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    synchronize()
    start = time.perf_counter()
    call_model(model, batch)
    synchronize()
    return time.perf_counter() - start
