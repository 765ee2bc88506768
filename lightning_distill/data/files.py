"""Labelled text in files: read rows and labels, and when a file is wrong say which file, which line and why.

Every error is a ``ValueError`` of one line that starts with ``file:line:``, as compilers and editors write it.
"""

import csv
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_distill.class_names import placeholder, placeholder_index

#: A label LABEL_<i> beyond this is taken for a mistake.
MOST_CLASSES = 100_000


class Table(NamedTuple):
    """Columns of a file, and where each row came from.

    Attributes:
        name: the file, as errors name it.
        columns: column name -> one value per row.
        lines: line number of each row, starting from 1.
    """

    name: str
    columns: dict[str, list[Any]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def error(self, row: int, problem: str) -> ValueError:
        """Make the one-line error for a row."""
        return ValueError(f"{self.name}:{self.lines[row]}: {problem}")


def read_table(path: str | Path, columns: Sequence[str]) -> Table:
    r"""Read named columns of a ``.tsv``, ``.csv``, ``.jsonl`` or ``.parquet`` file.

    A tsv file has a header, one row per line and no quoting, so a quotation mark is a character like any other; a csv
    file is quoted as RFC 4180 says. Blank lines are skipped.

    Args:
        path: the file, UTF-8 (parquet: any).
        columns: the columns to keep.

    Returns:
        The rows of the file, with values as they are in it (strings for tsv and csv).

    Raises:
        ValueError: the file is missing, empty or of an unknown kind, a column is missing (the nearest one is named), or
            a line cannot be read.
        ModuleNotFoundError: a parquet file, and pyarrow is not installed.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "reviews.tsv"
        >>> _ = file.write_text('sentence\tlabel\na "real" delight\t1\ndull\t0\n')
        >>> read_table(file, ["sentence", "label"]).columns
        {'sentence': ['a "real" delight', 'dull'], 'label': ['1', '0']}
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; known are {', '.join(_READERS)}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    table = _READERS[path.suffix](path, columns)
    if not len(table):
        raise ValueError(f"{path}: the file has no rows")
    return table


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    # Lines end at a newline alone: str.splitlines would also break a sentence at U+2028 or a form feed.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from None


def read_text(path: str | Path) -> str:
    """Read a file of plain text.

    Args:
        path: the file, UTF-8.

    Returns:
        Its text, with the line ends that are in it.

    Raises:
        ValueError: the file is missing, or a line is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    return "".join(line for _, line in _decoded_lines(path))


def check_columns(place: str, columns: Sequence[str], present: Sequence[str]) -> None:
    """Raise a ``ValueError`` that names the nearest column if one of ``columns`` is not among those ``present``."""
    for column in columns:
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{place}: no column {column!r}{hint}; the columns are {', '.join(present)}")


def _from_records(path: Path, columns: Sequence[str], records: Iterator[tuple[int, list[str]]]) -> Table:
    """Make a table of records whose first is the header."""
    header_line, header = next(records, (1, []))
    if not header:
        raise ValueError(f"{path}: the file is empty")
    check_columns(f"{path}:{header_line}", columns, header)
    positions = {column: header.index(column) for column in columns}
    table = Table(str(path), {column: [] for column in columns}, [])
    for line, record in records:
        if len(record) != len(header):
            raise ValueError(f"{path}:{line}: {len(record)} fields where the header has {len(header)}")
        for column, position in positions.items():
            table.columns[column].append(record[position])
        table.lines.append(line)
    return table


def _read_tsv(path: Path, columns: Sequence[str]) -> Table:
    rows = ((number, line.rstrip("\r\n")) for number, line in _decoded_lines(path))
    return _from_records(path, columns, ((number, line.split("\t")) for number, line in rows if line))


def _read_csv(path: Path, columns: Sequence[str]) -> Table:
    reader = csv.reader((line for _, line in _decoded_lines(path)), strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        while True:
            first_line = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(f"{path}:{first_line}: not a csv record ({error})") from None
            if record:
                yield first_line, record

    return _from_records(path, columns, records())


def _read_jsonl(path: Path, columns: Sequence[str]) -> Table:
    table = Table(str(path), {column: [] for column in columns}, [])
    for number, line in _decoded_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, but got {type(record).__name__}")
        check_columns(f"{path}:{number}", columns, list(record))
        for column in columns:
            table.columns[column].append(record[column])
        table.lines.append(number)
    return table


def _read_parquet(path: Path, columns: Sequence[str]) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f'{path}: reading parquet needs pyarrow; run: pip install "lightning-distill[parquet]"'
        ) from None
    try:
        check_columns(str(path), columns, pyarrow.parquet.read_schema(path).names)
        data = pyarrow.parquet.read_table(path, columns=list(columns)).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a parquet file ({reason})") from None
    return Table(str(path), data, list(range(1, len(data[columns[0]]) + 1)))


_READERS: dict[str, Callable[[Path, Sequence[str]], Table]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def texts(table: Table, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Take the text of each row: one string, or two for a sentence pair.

    Args:
        table: the rows.
        columns: the text columns.

    Returns:
        One tuple per row, with a string per column.

    Raises:
        ValueError: a value is not text, or every text of a row is empty.

    Example:
        >>> texts(Table("rows", {"sentence": ["good", "bad"]}, [1, 2]), ["sentence"])
        [('good',), ('bad',)]
    """
    rows = list(zip(*(table.columns[column] for column in columns), strict=True))
    for index, row in enumerate(rows):
        for column, value in zip(columns, row, strict=True):
            if not isinstance(value, str):
                raise table.error(index, f"column {column!r} holds {value!r}, which is not text")
        if not any(value.strip() for value in row):
            raise table.error(index, f"no text in {' or '.join(map(repr, columns))}")
    return rows


def scores(table: Table, column: str) -> list[float]:
    """Take the number of each row, for regression.

    Args:
        table: the rows.
        column: the column of the numbers.

    Returns:
        One finite float per row.

    Raises:
        ValueError: a value is not a finite number.

    Example:
        >>> scores(Table("rows", {"score": ["3.5", 2]}, [1, 2]), "score")
        [3.5, 2.0]
    """
    values = []
    for row, value in enumerate(table.columns[column]):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise table.error(row, f"column {column!r} holds {value!r}, which is not a finite number")
        values.append(number)
    return values


def label_names(table: Table, column: str) -> list[str]:
    """Name the classes of a training file, in the order of their ids: whole numbers by size, strings by alphabet.

    Names that transformers makes up say which class they are: ``LABEL_10`` is class 10, whether there are rows of class
    9 or not.

    Args:
        table: the rows to train on.
        column: the label column.

    Returns:
        The distinct labels.

    Raises:
        ValueError: a label is empty or a fraction, or all rows have the same label.

    Example:
        >>> label_names(Table("rows", {"stars": ["10", "9", "10"]}, [1, 2, 3]), "stars")
        ['9', '10']
    """
    names = sorted(set(_labels(table, column)))
    if len(names) == 1:
        raise ValueError(
            f"{table.name}: every row has the label {names[0]!r} in column {column!r}; expected two labels"
        )
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        return sorted(names, key=int)
    if classes := [index for name in names if (index := placeholder_index(name)) is not None]:
        if len(classes) < len(names) or max(classes) > MOST_CLASSES:
            raise ValueError(
                f"{table.name}: column {column!r} holds {placeholder(max(classes))!r}, which says which class it is, "
                f"beside {len(names) - 1} other labels, which do not fit; set `label_names` to their names in order"
            )
        return [placeholder(index) for index in range(max(classes) + 1)]
    if all(map(_is_number, names)):
        row = next(row for row, name in enumerate(_labels(table, column)) if not re.fullmatch(r"-?\d+", name))
        raise table.error(row, f"the label {table.columns[column][row]!r} is a fraction; set task to 'regression'")
    return names


def label_ids(table: Table, column: str, names: Sequence[str], source: str) -> list[int]:
    """Number the label of each row by its place among the names.

    Args:
        table: the rows.
        column: the label column.
        names: the classes in the order of their ids.
        source: where the names come from, for the error.

    Returns:
        One id per row.

    Raises:
        ValueError: a label is not among the names.

    Example:
        >>> label_ids(Table("rows", {"label": ["yes", "no"]}, [1, 2]), "label", ["no", "yes"], "train.tsv")
        [1, 0]
    """
    ids = {name: index for index, name in enumerate(names)}
    labels = _labels(table, column)
    for row, label in enumerate(labels):
        if label not in ids:
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise table.error(row, f"unknown label {label!r} in column {column!r}; the labels of {source} are {shown}")
    return [ids[label] for label in labels]


def _labels(table: Table, column: str) -> list[str]:
    labels = []
    for row, value in enumerate(table.columns[column]):
        label = str(int(value)) if isinstance(value, bool) else str(value).strip()
        if value is None or not label:
            raise table.error(row, f"empty label in column {column!r}")
        labels.append(label)
    return labels


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
