"""A bar for what takes long, on a terminal."""

from collections.abc import Iterable
from typing import TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tqdm.auto import tqdm

Item = TypeVar("Item")
_PATIENCE = 3.0  # seconds without a bar


def progress(items: Iterable[Item], what: str, unit: str = "it") -> Iterable[Item]:
    """Go through items; after three seconds a bar on stderr shows how far, if it is a terminal.

    Args:
        items: what to go through.
        what: what is done with them, such as ``"Reading train.tsv"``.
        unit: what they are called.

    Example:
        >>> sum(progress([1, 2], "Adding"))
        3
    """
    silent = True if getattr(rank_zero_only, "rank", 0) else None  # None: only on a terminal
    return tqdm(items, desc=what, unit=unit, delay=_PATIENCE, leave=False, disable=silent)
