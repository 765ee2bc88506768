"""Files of rows as tables. What cannot be read is a ``ValueError`` of one line that begins with file and line.

The ``datasets`` and pandas libraries read these kinds, too, but say neither the line of what is wrong nor that they
guessed: a text ``NA`` becomes a missing value, a ragged row is filled up, a repeated column gets another name.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_distill.data.progress import progress
from lightning_distill.data.table import Table, check_columns, chosen_columns, one_line, shown

Choices = Sequence[Sequence[str]]

# The marks that files of other encodings begin with; nothing in UTF-8 begins so.
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "a gz file without the ending .gz"}


def read_table(path: str | Path, columns: Sequence[str], *others: Sequence[str], binary: Collection[str] = ()) -> Table:
    r"""Read named columns of a ``.tsv``, ``.csv``, ``.jsonl`` (``.ndjson``), ``.json`` or ``.parquet`` file.

    A tsv file has a header, one row per line and no quoting, so a quotation mark is a character like any other; a csv
    file is quoted as RFC 4180 says. A json file holds a list of objects, or an object of columns. Blank lines are
    skipped. All but parquet may be packed, as ``.tsv.gz``.

    Args:
        path: the file, UTF-8 (parquet: any).
        columns: the columns to keep.
        *others: other lists of columns; the first list that is there in full is kept.
        binary: those of them that may hold bytes, as encoded pictures do.

    Returns:
        The rows of the file, with values as they are in it: strings for tsv and csv; in the other kinds lists and
        objects, too. A parquet file that ``datasets`` wrote says the names of its classes.

    Raises:
        ValueError: the file is missing, empty or of an unknown kind, a column is missing (the nearest one is named) or
            there twice, or a line cannot be read.
        ModuleNotFoundError: a parquet file, and pyarrow is not installed.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "reviews.tsv"
        >>> _ = file.write_text('sentence\tlabel\na "real" delight\t1\ndull\t0\n')
        >>> read_table(file, ["sentence", "label"]).columns
        {'sentence': ['a "real" delight', 'dull'], 'label': ['1', '0']}
    """
    path = Path(path)
    kind = kind_of(path)
    if kind not in _READERS:
        raise ValueError(one_line(f"{path}: unknown kind of file {kind!r}; known are {', '.join(_READERS)}"))
    check_file(path)
    table = _READERS[kind](path, [columns, *others], binary)
    if not len(table):
        raise ValueError(f"{path}: the file has no rows")
    return table


def read_text(path: str | Path) -> str:
    """Read a file of plain text in UTF-8, which may be packed as gz, with the line ends that are in it.

    Raises:
        ValueError: the file is missing, or a line is not UTF-8.
    """
    path = Path(path)
    check_file(path)
    return "".join(line for _, line in numbered_lines(path))


def kind_of(path: Path) -> str:
    """The ending that says the kind of a file, in lower case, without that of gz."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def check_file(path: Path) -> None:
    """Refuse a path that is no file."""
    try:
        if path.is_dir():
            raise ValueError(f"{path}: this is a folder; expected a file")
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file of UTF-8 text, which may be packed as gz, with their numbers and their ends."""
    # Lines end at a newline alone: str.splitlines would also break a sentence at U+2028 or a form feed.
    number = 0
    opened: Callable[[Path, Any], Any] = gzip.open if path.suffix.lower() == ".gz" else Path.open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(progress(file, f"Reading {path.name}", unit=" lines"), start=1):
                yield number, _decoded(path, number, line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(one_line(f"{path}:{number + 1}: not a whole gz file ({error})")) from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        found = _OTHER_ENCODINGS.get(line[:2]) if number == 1 else None
        hint = f"; it looks like {found}" if found else ""
        raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason}){hint}") from None
    if "\0" in text:
        raise ValueError(f"{path}:{number}: a NUL character; the file is binary, or text that is not UTF-8")
    return text


# -- records: tsv and csv ------------------------------------------------------------------------------------------


def _read_tsv(path: Path, choices: Choices, _: Any) -> Table:
    """A header and one row per line, without quoting."""
    rows = ((number, line.rstrip("\r\n")) for number, line in numbered_lines(path))
    return _from_records(path, choices, ((number, line.split("\t")) for number, line in rows if line))


def _read_csv(path: Path, choices: Choices, _: Any) -> Table:
    """A header and rows as RFC 4180 says."""
    reader = csv.reader((line for _, line in numbered_lines(path)), strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        first_line = 1
        try:
            for record in reader:
                if record:
                    yield first_line, record
                first_line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}:{first_line}: not a csv record ({error})") from None

    # The csv module refuses longer fields, for all readers of a process alike; a document may be longer.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        return _from_records(path, choices, records())
    finally:
        csv.field_size_limit(limit)


def _from_records(path: Path, choices: Choices, records: Iterator[tuple[int, list[str]]]) -> Table:
    """A table of records whose first is the header."""
    header_line, header = next(records, (1, []))
    if not header:
        raise ValueError(f"{path}: the file is empty")
    if any("\r" in name for name in header):
        raise ValueError(f"{path}:{header_line}: a carriage return in the header; end lines with a newline")
    columns = chosen_columns(f"{path}:{header_line}", choices, header)
    positions = {column: header.index(column) for column in columns}
    table = Table(str(path), {column: [] for column in columns}, [], [name for name in header if name not in columns])
    for line, record in records:
        if len(record) != len(header):
            raise ValueError(f"{path}:{line}: {len(record)} fields where the header has {len(header)}")
        for column, position in positions.items():
            table.columns[column].append(record[position])
        table.lines.append(line)
    return table


# -- objects: jsonl and json ---------------------------------------------------------------------------------------


def _read_jsonl(path: Path, choices: Choices, _: Any) -> Table:
    """One JSON object per line."""
    return _from_objects(path, choices, _objects(path, numbered_lines(path)))


def _read_json(path: Path, choices: Choices, _: Any) -> Table:
    """A list of objects, an object of columns (lists, or as pandas writes them), or one JSON object per line."""
    lines = list(numbered_lines(path))
    first = next((line for _, line in lines if line.strip()), None)
    if first is None:
        raise ValueError(f"{path}: the file is empty")
    if len(lines) > 1 and first.rstrip().endswith("}"):  # whole in its first line, and goes on
        return _from_objects(path, choices, _objects(path, lines))
    data = _parsed(str(path), "".join(line for _, line in lines))
    if isinstance(data, dict):
        columns = chosen_columns(str(path), choices, list(data))
        if all(isinstance(data[column], list | dict) for column in columns):
            return _from_columns(path, columns, data)
        data = [data]  # one row
    if not isinstance(data, list):
        raise ValueError(f"{path}: expected a list of JSON objects, but got {type(data).__name__}")
    return _from_objects(path, choices, enumerate(data, start=1))


def _objects(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    return ((number, _parsed(f"{path}:{number}", line)) for number, line in lines if line.strip())


def _parsed(place: str, text: str) -> Any:
    """Parse JSON; what Python's parser would pass over or stumble on is an error, too."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            check_columns(place, list(found), [key for key, _ in pairs])
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(one_line(f"{place}: not JSON ({error.msg} at {at}column {error.colno})")) from None
    except RecursionError:
        raise ValueError(f"{place}: not JSON that can be read (nested too deep)") from None
    except ValueError as error:
        if str(error).startswith(place):
            raise
        raise ValueError(f"{place}: not JSON that can be read (a number of too many digits)") from None


def _from_objects(path: Path, choices: Choices, objects: Iterable[tuple[int, Any]]) -> Table:
    """A table of JSON objects; the first says which columns are read."""
    names: dict[str, None] = {}
    table = Table(str(path), {}, [])
    for number, record in objects:
        place = f"{path}:{number}"
        if not isinstance(record, dict):
            raise ValueError(f"{place}: expected a JSON object, but got {type(record).__name__}")
        if not table.lines:
            table.columns.update({column: [] for column in chosen_columns(place, choices, list(record))})
        check_columns(place, list(table.columns), list(record))
        for column, values in table.columns.items():
            values.append(record[column])
        names.update(dict.fromkeys(record))
        table.lines.append(number)
    return Table(table.name, table.columns, table.lines, [name for name in names if name not in table.columns])


def _from_columns(path: Path, columns: Sequence[str], data: dict[str, Any]) -> Table:
    """A table of an object of columns: lists, or objects of values by the number of their row."""
    rows = {name: data[name] if isinstance(data[name], dict) else dict(enumerate(data[name])) for name in columns}
    numbers = list(rows[columns[0]])
    if any(list(values) != numbers for values in rows.values()):
        lengths = ", ".join(f"{name!r} {len(values)}" for name, values in rows.items())
        raise ValueError(one_line(f"{path}: the columns are of different rows; their numbers are {lengths}"))
    found = {name: list(values.values()) for name, values in rows.items()}
    return Table(str(path), found, list(range(1, len(numbers) + 1)), [name for name in data if name not in columns])


# -- Arrow: parquet and the hub ------------------------------------------------------------------------------------


def _read_parquet(path: Path, choices: Choices, binary: Collection[str]) -> Table:
    """A parquet file; the lines are its rows."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f'{path}: reading parquet needs pyarrow; run: pip install "lightning-distill[parquet]"'
        ) from None
    # By pyarrow, which `datasets` reads parquet with: through its own reader the file is first copied to a cache.
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            columns = chosen_columns(str(path), choices, present)
            data = file.read(columns=list(columns))
    except (pyarrow.ArrowException, OSError) as error:
        reason = one_line((str(error).splitlines() or [type(error).__name__])[0])
        raise ValueError(f"{path}: not a parquet file ({reason})") from None
    table = from_arrow(str(path), data, columns, present, binary)
    try:
        import datasets
    except ModuleNotFoundError:
        return table
    return replace(table, class_names=class_names_of(datasets.Features.from_arrow_schema(data.schema)))


def class_names_of(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the classes of each column that has them, or lists of them, as ``datasets`` describes columns."""
    kinds = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    return {column: list(kind.names) for column, kind in kinds.items() if getattr(kind, "names", None)}


def from_arrow(
    place: str, data: Any, columns: Sequence[str], present: Sequence[str], binary: Collection[str] = ()
) -> Table:
    """Make a table of columns of a ``pyarrow.Table``.

    Args:
        place: where it comes from, as errors name it.
        data: the ``pyarrow.Table``.
        columns: the columns to keep.
        present: all columns of the source.
        binary: those that may hold bytes.

    Raises:
        ValueError: a column holds times, or bytes and may not, or a value that cannot be read.
    """
    from pyarrow import types

    table = Table(place, {}, list(range(1, len(data) + 1)), [name for name in present if name not in columns])
    for column in columns:
        kind = data.schema.field(column).type
        bytes_ = column not in binary and (types.is_binary(kind) or types.is_large_binary(kind))
        if types.is_temporal(kind) or bytes_:
            raise ValueError(one_line(f"{place}: column {column!r} is of type {kind}, neither text nor numbers"))
        table.columns[column] = values = []
        try:
            for value in data[column]:
                values.append(value.as_py())
        except (ValueError, OverflowError) as error:
            problem = f"column {column!r} holds a value that cannot be read ({shown(str(error))})"
            raise table.error(len(values), problem) from None
    return table


_READERS: dict[str, Callable[[Path, Choices, Collection[str]], Table]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".ndjson": _read_jsonl,
}
