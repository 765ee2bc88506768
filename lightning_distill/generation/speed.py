"""Tokens per second of several ways to write, in turns."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from tqdm.auto import tqdm


def tokens_per_second(
    writers: Mapping[str, Callable[[], int]],
    *,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, float]:
    """Median tokens per second of several ways to write.

    They take turns, so that a machine that slows down slows all of them.

    Args:
        writers: By name, each writes once and returns how many tokens that was.
        repeats: How many turns, after one that is not counted.
        device: Where they write; a GPU is synchronised around each turn.
        progress: Whether to show a bar on stderr.

    Example:
        >>> import time
        >>> from lightning_distill.generation.speed import tokens_per_second
        >>> speed = tokens_per_second({"fast": lambda: 9, "slow": lambda: time.sleep(0.01) or 9})
        >>> speed["fast"] > speed["slow"]
        True
    """
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    speeds: dict[str, list[float]] = {name: [] for name in writers}
    turns = [(turn, name) for turn in range(repeats + 1) for name in writers]
    for turn, name in tqdm(turns, desc="Measuring speed", leave=False, disable=not progress):
        synchronize()
        start = time.perf_counter()
        written = writers[name]()
        synchronize()
        if turn:
            speeds[name].append(written / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}
