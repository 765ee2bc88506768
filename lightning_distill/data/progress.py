"""A bar for what takes long, on a terminal."""

from collections.abc import Iterable
from typing import TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tqdm.auto import tqdm

Item = TypeVar("Item")
_PATIENCE = 3.0  # seconds without a bar


def progress(items: Iterable[Item], what: str, unit: str = "it") -> Iterable[Item]:
    """Go through items; after three seconds a bar on stderr shows how far, if it is a terminal."""
    silent = True if getattr(rank_zero_only, "rank", 0) else None  # None: only on a terminal
    return tqdm(items, desc=what, unit=unit, delay=_PATIENCE, leave=False, disable=silent)
