"""Rows of a file or of a data set, and where each came from, so that what is wrong is said with its place."""

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

_SHOWN = 20  # names in an error

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 60


@dataclass(frozen=True)
class Table:
    """Columns of a file, and where each row came from.

    Attributes:
        name: the file, as errors name it.
        columns: column name -> one value per row.
        lines: line number of each row, starting from 1.
        unused: the file's other columns.
        class_names: column -> the names of its classes, in the order of their ids, where the source itself says them.
    """

    name: str
    columns: dict[str, list[Any]]
    lines: list[int]
    unused: Sequence[str] = ()
    class_names: Mapping[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """Where a row comes from, as errors name it."""
        return f"{self.name}:{self.lines[row]}"

    def error(self, row: int, problem: str) -> ValueError:
        """Make the one-line error for a row."""
        return ValueError(one_line(f"{self.place(row)}: {problem}"))

    def note(self, said: str = "") -> None:
        """Tell the user, once for all processes, what became of the rows, and which columns are not used."""
        unused = f"columns that are not used: {listed(self.unused)}" if self.unused else ""
        if said or unused:
            rank_zero_info(f"{self.name}: {'; '.join(filter(None, (said, unused)))}")

    def take(self, rows: Sequence[int]) -> "Table":
        """Make a table of some of the rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, lines=[self.lines[row] for row in rows])

    def explode(self, column: str) -> "Table":
        """Make a table of the items of a column of lists, each at the place of its row, as pandas and Polars name it.

        What is said of a label, :func:`lightning_distill.data.columns.label_ids`, can so be said of each of several.

        Raises:
            ValueError: a value is not a list.

        Example:
            >>> table = Table("tags.jsonl", {"tags": [["B", "O"], ["O"]]}, [1, 2]).explode("tags")
            >>> table.columns["tags"], table.lines
            (['B', 'O', 'O'], [1, 1, 2])
        """
        items: list[Any] = []
        lines: list[int] = []
        for row, value in enumerate(self.columns[column]):
            if not isinstance(value, list | tuple):
                raise self.error(row, f"column {column!r} holds {shown(value)}, which is not a list")
            items += value
            lines += [self.lines[row]] * len(value)
        return replace(self, columns={column: items}, lines=lines)


def one_line(text: str) -> str:
    r"""Escape what would break a line or could not be printed: line ends, control characters, lone surrogates.

    Example:
        >>> print(one_line("two\nlines"))
        two\nlines
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def shown(value: object) -> str:
    """Show a value of a file in an error, shortened."""
    return _shortened.repr(value)


def listed(names: Sequence[str]) -> str:
    """Show names in an error, the first of them if they are many."""
    cut = (name if len(name) <= 60 else f"{name[:57]}..." for name in map(str, names[:_SHOWN]))
    return ", ".join(cut) + (", ..." if len(names) > _SHOWN else "")


def nearest(name: str, names: Sequence[str]) -> str:
    """Say which of the names was probably meant, if one is near."""
    near = difflib.get_close_matches(name, names, n=1) or [other for other in names if other.lower() == name.lower()]
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_columns(place: str, columns: Sequence[str], present: Sequence[str]) -> None:
    """Raise a ``ValueError`` if one of ``columns`` is not ``present``, with the nearest name, or is there twice."""
    for column in columns:
        if column not in present:
            hint = nearest(column, present)
            raise ValueError(one_line(f"{place}: no column {column!r}{hint}; the columns are {listed(present)}"))
        if present.count(column) > 1:
            raise ValueError(one_line(f"{place}: {present.count(column)} columns are named {column!r}; rename one"))


def chosen_columns(place: str, choices: Sequence[Sequence[str]], present: Sequence[str]) -> Sequence[str]:
    """Choose the first list of columns that is there in full; where none is, the error is about the first of all."""
    chosen = next((columns for columns in choices if set(columns) <= set(present)), choices[0])
    check_columns(place, chosen, present)
    return chosen
