"""Readers of each kind of file. What they cannot read is a ``ValueError`` of one line that names file and line.

The ``datasets`` and pandas libraries read these kinds, too, but say neither the line of what is wrong nor that they
guessed: a text ``NA`` becomes a missing value, a ragged row is filled up, a repeated column gets another name.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from lightning_distill.data.progress import progress
from lightning_distill.data.table import Table, check_columns, chosen_columns, one_line, shown

Choices = Sequence[Sequence[str]]

# The marks that files of other encodings begin with; nothing in UTF-8 begins so.
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "a gz file without the ending .gz"}


def check_file(path: Path) -> None:
    """Raise a ``ValueError`` if a path is not that of a file."""
    try:
        if path.is_dir():
            raise ValueError(f"{path}: this is a folder; expected a file")
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read the lines of a file of UTF-8 text, which may be packed as gz, with their numbers and their ends."""
    # Lines end at a newline alone: str.splitlines would also break a sentence at U+2028 or a form feed.
    number = 0
    try:
        with _opened(path) as file:
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


def _from_records(path: Path, choices: Choices, records: Iterator[tuple[int, list[str]]]) -> Table:
    """Make a table of records whose first is the header."""
    header_line, header = next(records, (1, []))
    if not header:
        raise ValueError(f"{path}: the file is empty")
    if any("\r" in name for name in header):
        raise ValueError(f"{path}:{header_line}: a carriage return in the header; end lines with a newline")
    columns = chosen_columns(f"{path}:{header_line}", choices, header)
    positions = {column: header.index(column) for column in columns}
    unused = [name for name in header if name not in columns]
    table = Table(str(path), {column: [] for column in columns}, [], unused)
    for line, record in records:
        if len(record) != len(header):
            raise ValueError(f"{path}:{line}: {len(record)} fields where the header has {len(header)}")
        for column, position in positions.items():
            table.columns[column].append(record[position])
        table.lines.append(line)
    return table


def read_tsv(path: Path, choices: Choices) -> Table:
    """Read a header and one row per line, without quoting."""
    rows = ((number, line.rstrip("\r\n")) for number, line in decoded_lines(path))
    return _from_records(path, choices, ((number, line.split("\t")) for number, line in rows if line))


def read_csv(path: Path, choices: Choices) -> Table:
    """Read a header and rows as RFC 4180 says."""
    reader = csv.reader((line for _, line in decoded_lines(path)), strict=True)

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

    # The csv module refuses longer fields, for all readers of a process alike; a document may be longer.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        return _from_records(path, choices, records())
    finally:
        csv.field_size_limit(limit)


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
    """Make a table of JSON objects; the first says which columns are read."""
    columns: Sequence[str] = []
    others: dict[str, None] = {}
    table = Table(str(path), {}, [])
    for number, record in objects:
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, but got {type(record).__name__}")
        if not table.lines:
            columns = chosen_columns(f"{path}:{number}", choices, list(record))
            table.columns.update({column: [] for column in columns})
        check_columns(f"{path}:{number}", columns, list(record))
        for column in columns:
            table.columns[column].append(record[column])
        others.update(dict.fromkeys(record))
        table.lines.append(number)
    return Table(table.name, table.columns, table.lines, [name for name in others if name not in columns])


def _objects(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    return ((number, _parsed(f"{path}:{number}", line)) for number, line in lines if line.strip())


def read_jsonl(path: Path, choices: Choices) -> Table:
    """Read one JSON object per line."""
    return _from_objects(path, choices, _objects(path, decoded_lines(path)))


def read_json(path: Path, choices: Choices) -> Table:
    """Read a list of objects, an object of columns (lists, or as pandas writes them), or one JSON object per line."""
    lines = list(decoded_lines(path))
    first = next((line for _, line in lines if line.strip()), None)
    if first is None:
        raise ValueError(f"{path}: the file is empty")
    if len(lines) > 1 and first.rstrip().endswith("}"):  # whole in its first line, and goes on
        return _from_objects(path, choices, _objects(path, lines))
    data = _parsed(str(path), "".join(line for _, line in lines))
    if isinstance(data, dict):
        columns = chosen_columns(str(path), choices, list(data))
        if not all(isinstance(data[column], list | dict) for column in columns):
            data = [data]  # one row
        else:
            kept = {name: data[name] for name in columns}
            found = {name: list(v.values()) if isinstance(v, dict) else v for name, v in kept.items()}
            keys = [list(v) if isinstance(v, dict) else list(range(len(v))) for v in kept.values()]
            if any(each != keys[0] for each in keys):
                lengths = ", ".join(f"{name!r} {len(values)}" for name, values in found.items())
                raise ValueError(one_line(f"{path}: the columns are of different rows; their numbers are {lengths}"))
            unused = [name for name in data if name not in columns]
            return Table(str(path), found, list(range(1, len(keys[0]) + 1)), unused)
    if not isinstance(data, list):
        raise ValueError(f"{path}: expected a list of JSON objects, but got {type(data).__name__}")
    return _from_objects(path, choices, enumerate(data, start=1))


def read_parquet(path: Path, choices: Choices) -> Table:
    """Read a parquet file; the lines are its rows."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f'{path}: reading parquet needs pyarrow; run: pip install "lightning-distill[parquet]"'
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            columns = chosen_columns(str(path), choices, present)
            data = file.read(columns=list(columns))
    except (pyarrow.ArrowException, OSError) as error:
        reason = one_line((str(error).splitlines() or [type(error).__name__])[0])
        raise ValueError(f"{path}: not a parquet file ({reason})") from None
    return from_arrow(str(path), data, columns, present)


def from_arrow(place: str, data: Any, columns: Sequence[str], present: Sequence[str]) -> Table:
    """Make a table of columns of a ``pyarrow.Table``.

    Args:
        place: where it comes from, as errors name it.
        data: the ``pyarrow.Table``.
        columns: the columns to keep.
        present: all columns of the source.

    Raises:
        ValueError: a column holds times or bytes, or a value that is neither.
    """
    from pyarrow import types

    for column in columns:
        kind = data.schema.field(column).type
        if types.is_temporal(kind) or types.is_binary(kind) or types.is_large_binary(kind):
            raise ValueError(one_line(f"{place}: column {column!r} is of type {kind}, neither text nor numbers"))
    unused = [name for name in present if name not in columns]
    table = Table(place, {}, list(range(1, len(data) + 1)), unused)
    for column in columns:
        table.columns[column] = _python_values(table, column, data[column])
    return table


def _python_values(table: Table, column: str, values: Any) -> list[Any]:
    try:
        found: list[Any] = values.to_pylist()
        return found
    except (ValueError, OverflowError):
        for row, value in enumerate(values):
            try:
                value.as_py()
            except (ValueError, OverflowError) as error:
                problem = f"column {column!r} holds a value that cannot be read ({shown(str(error))})"
                raise table.error(row, problem) from None
        raise


READERS: dict[str, Callable[[Path, Choices], Table]] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".json": read_json,
    ".ndjson": read_jsonl,
}


def kind_of(path: Path) -> str:
    """The ending that says the kind of a file, in lower case, without that of gz."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()
