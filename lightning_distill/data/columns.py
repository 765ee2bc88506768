"""What the columns of a table hold: texts, numbers, labels. What is none is refused by its file and line."""

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.data.table import Table, listed, nearest, one_line, shown
from lightning_distill.models.class_names import placeholder, placeholder_index

#: A label LABEL_<i> beyond this is taken for a mistake.
MOST_CLASSES = 100_000
_LONGEST_LABEL = 200  # characters; what is longer is no name of a class
_FLOAT32_MAX = 3.4028234663852886e38


def check_text(table: Table, row: int, column: str, value: object) -> None:
    """Refuse what is not text, or text with half of a character, which no tokenizer takes."""
    if not isinstance(value, str):
        raise table.error(row, f"column {column!r} holds {shown(value)}, which is not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])
            raise table.error(row, f"column {column!r} holds {half}, half of a character, at {error.start}") from None


def texts(table: Table, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The text of each row: one string, or two for a sentence pair.

    Raises:
        ValueError: a value is not text, has half of a character, or every text of a row is empty.

    Example:
        >>> texts(Table("rows", {"sentence": ["good", "bad"]}, [1, 2]), ["sentence"])
        [('good',), ('bad',)]
    """
    rows = list(zip(*(table.columns[column] for column in columns), strict=True))
    for index, row in enumerate(rows):
        for column, value in zip(columns, row, strict=True):
            check_text(table, index, column, value)
        if not any(value.strip() for value in row):
            raise table.error(index, f"no text in {' or '.join(map(repr, columns))}")
    return rows


def scores(table: Table, column: str) -> list[float]:
    """The number of each row, for regression.

    Raises:
        ValueError: a value is not a finite number.

    Example:
        >>> scores(Table("rows", {"score": ["3.5", 2]}, [1, 2]), "score")
        [3.5, 2.0]
    """
    values = []
    for row, value in enumerate(table.columns[column]):
        number = _number(value)
        if number is None or not abs(number) <= _FLOAT32_MAX:
            raise table.error(row, f"column {column!r} holds {shown(value)}, which is not a finite number")
        values.append(number)
    return values


def label_names(table: Table, column: str) -> list[str]:
    """The classes of a training file in the order of their ids: whole numbers by size, strings by alphabet.

    Names that transformers makes up say which class they are: ``LABEL_10`` is class 10, whether there are rows of class
    9 or not. Whole numbers may be written as ``1.0``.

    Raises:
        ValueError: a label is empty, a fraction or neither text nor a number, or all rows have the same label.

    Example:
        >>> label_names(Table("rows", {"stars": ["10", "9", "10"]}, [1, 2, 3]), "stars")
        ['9', '10']
    """
    labels = _labels(table, column)
    names = sorted(set(labels))
    if not names:
        raise ValueError(one_line(f"{table.name}: no row has a label in column {column!r}"))
    if len(names) == 1:
        problem = f"every row has the label {names[0]!r} in column {column!r}; expected two labels"
        raise ValueError(one_line(f"{table.name}: {problem}"))
    if all(map(is_whole, names)):
        return sorted(names, key=int)
    if classes := [index for name in names if (index := placeholder_index(name)) is not None]:
        if len(classes) < len(names) or max(classes) > MOST_CLASSES:
            raise ValueError(
                f"{table.name}: column {column!r} holds {placeholder(max(classes))!r}, which says which class it is, "
                f"beside {len(names) - 1} other labels, which do not fit; set `label_names` to their names in order"
            )
        return [placeholder(index) for index in range(max(classes) + 1)]
    if all(_number(name) is not None for name in names):
        if infinite := [row for row, name in enumerate(labels) if not math.isfinite(float(name))]:
            problem = f"column {column!r} holds {labels[infinite[0]]!r} for a label among numbers"
            raise table.error(infinite[0], problem)
        row = next(row for row, name in enumerate(labels) if not is_whole(name))
        value = shown(table.columns[column][row])
        raise table.error(row, f"the label {value} is a fraction; set task to 'regression'")
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            said = f"{table.name}: the labels {other!r} and {name!r} in column {column!r} are two classes"
            rank_zero_warn(one_line(f"{said}, though they differ in upper and lower case alone"), stacklevel=2)
    return names


def label_ids(table: Table, column: str, names: Sequence[str], source: str) -> list[int]:
    """The place of each row's label among the names of the classes, which the error says the ``source`` of.

    Raises:
        ValueError: a label is not among the names.

    Example:
        >>> label_ids(Table("rows", {"label": ["yes", "no"]}, [1, 2]), "label", ["no", "yes"], "train.tsv")
        [1, 0]
    """
    ids = {whole_number(name): index for index, name in enumerate(names)}
    labels = _labels(table, column)
    for row, label in enumerate(labels):
        if label not in ids:
            raise table.error(
                row,
                f"unknown label {label!r} in column {column!r}; the labels of {source} are {listed(names)}"
                f"{nearest(label, list(names))}",
            )
    return [ids[label] for label in labels]


def whole_number(name: str) -> str:
    """Take the decimal point off a whole number, which tables of numbers with gaps are written with."""
    return str(int(name.partition(".")[0])) if re.fullmatch(r"-?\d{1,200}\.0*", name) else name


def is_whole(name: str) -> bool:
    """Whether a name of a class is a whole number."""
    return re.fullmatch(r"-?\d+", name) is not None


def _labels(table: Table, column: str) -> list[str]:
    names: dict[Any, str] = {}  # a million rows have few labels
    labels = []
    for row, value in enumerate(table.columns[column]):
        # By type too, as True is 1; what else there may be need not have a hash.
        key = (type(value), value) if isinstance(value, str | int | float) else (None, row)
        if key not in names:
            names[key] = _label(table, row, column, value)
        labels.append(names[key])
    return labels


def _label(table: Table, row: int, column: str, value: Any) -> str:
    """The name of a class: text, or a whole number, however it is written: 1.0 is class 1."""
    if getattr(value, "shape", None) == ():  # a number of NumPy or torch
        value = value.item()
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        raise table.error(row, f"empty label in column {column!r}")
    if isinstance(value, int):
        if abs(value) >= 10**_LONGEST_LABEL:
            raise table.error(row, f"column {column!r} holds a number of more than {_LONGEST_LABEL} digits")
        value = int(value)
    elif isinstance(value, float | Decimal):
        if math.isinf(value):
            raise table.error(row, f"column {column!r} holds {value!r}, which is no label")
        value = int(value) if value == int(value) else value
    elif not isinstance(value, str):
        raise table.error(row, f"column {column!r} holds {shown(value)}, which is neither text nor a number")
    label = whole_number(str(value).strip())
    if not label:
        raise table.error(row, f"empty label in column {column!r}")
    if len(label) > _LONGEST_LABEL:
        raise table.error(row, f"column {column!r} holds a label of {len(label)} characters, {shown(label)}")
    check_text(table, row, column, label)
    return label


def _number(value: Any) -> float | None:
    """The number that a value is, or that a text says; None where it is none."""
    try:
        return None if isinstance(value, bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
