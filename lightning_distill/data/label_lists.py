"""Several labels a row: a field that holds them all, or a list."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_distill.data.table import Table, shown


def label_lists(table: Table, column: str, separator: str | None = None) -> list[list[Any]]:
    """The labels of each row, none or more.

    Args:
        table: rows.
        column: holds lists of labels, or one field of labels; what is empty, or null, has none.
        separator: between the labels of a field; None: a field is one label.

    Raises:
        ValueError: a row has a label twice, as rows of a 0 or 1 for each label have, or holds nothing that labels are.

    Example:
        >>> label_lists(Table("rows", {"labels": ["joy, love", "", ["anger"]]}, [1, 2, 3]), "labels", separator=",")
        [['joy', 'love'], [], ['anger']]
    """
    found = []
    for row, value in enumerate(table.columns[column]):
        labels = _labels(value, separator)
        if len(set(map(str, labels))) < len(labels):
            raise table.error(
                row,
                f"column {column!r} holds {shown(value)}, with a label twice; list the labels that the row has, by "
                "name or number, not a 0 or 1 for each",
            )
        found.append(labels)
    return found


def _labels(value: Any, separator: str | None) -> list[Any]:
    if hasattr(value, "tolist"):  # an array of NumPy or torch
        value = value.tolist()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        if not value.strip():
            return []
        return [value] if separator is None else [part.strip() for part in value.split(separator)]
    return list(value) if isinstance(value, list | tuple | set | frozenset) else [value]


def one_hot_rows(ids: Sequence[int], sizes: Sequence[int], num_labels: int) -> Tensor:
    """A 0 or 1 for each label of each row.

    Args:
        ids: the labels of all rows, one row after the other.
        sizes: how many each row has.
        num_labels: how many there are.

    Returns:
        Float32 ``[rows, num_labels]``.

    Example:
        >>> one_hot_rows([2, 0], [1, 0, 1], 3)
        tensor([[0., 0., 1.],
                [0., 0., 0.],
                [1., 0., 0.]])
    """
    rows = torch.zeros(len(sizes), num_labels)
    places = list(chain.from_iterable([row] * size for row, size in enumerate(sizes)))
    rows[places, list(ids)] = 1.0
    return rows


def joined_labels(names: Sequence[str]) -> tuple[str, str] | None:
    """The separator, and a label which it joins of others, where there is one.

    Example:
        >>> joined_labels(["joy", "joy,love", "love"]), joined_labels(["red", "red, white"])
        ((',', 'joy,love'), None)
    """
    known = set(names)
    for separator in (",", ";", "|"):
        for name in names:
            parts = [part.strip() for part in name.split(separator)]
            if len(parts) > 1 and known.issuperset(parts):
                return separator, name
    return None
