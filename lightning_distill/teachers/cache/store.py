"""A teacher's signals on disk, found again by the content of the rows they belong to."""

import hashlib
import json
import logging
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_distill.teachers.cache.format import (
    FILE,
    FORMAT,
    check_description,
    is_file,
    write_whole,
)
from lightning_distill.teachers.cache.row_keys import SIZE

_log = logging.getLogger(__name__)

_MAGIC = b"signals2"
_ENTRIES_AT_A_TIME = 4096


class DamagedRows(ValueError):
    """Rows whose bytes are not those that were written; the store has forgotten them."""


class _Copy(NamedTuple):
    """Where a row is: its shard, the first of its bytes, the number of items of each field; and its checksum."""

    shard: str
    start: int
    counts: tuple[int, ...]
    checksum: int


class SignalStore:
    """Arrays by row, in shards that have one writer each: nothing is locked, and nothing is written twice.

    A row is known by a hash of its content (see :func:`row_keys`), never by where or when it came. Each process that
    writes makes a shard of its own: ``<shard>.rows``, and ``<shard>.index``, whose entries are added after the rows
    they point to. So any number of runs and processes write at once, on any file system, and read what the others have
    written so far; two that ask for one row at the same time both keep it. What a killed process left unfinished has no
    index entry. Entries and rows have checksums, which are verified whenever they are read, and a shard says in its
    first bytes which description it belongs to.

    Args:
        folder: Where; made where it is not.
        description: What the signals are and whose: JSON. It must be that of the store that is there.
        fields: Type and shape of one item of each array, by name.
        rank: Number of the process, seen in the names of its files.

    Raises:
        ValueError: If the folder holds another store, and the message names what differs; or other files.

    Example:
        >>> import tempfile, numpy as np
        >>> from lightning_distill.teachers.cache.store import SignalStore
        >>> store = SignalStore(tempfile.mkdtemp(), {"teacher": "a"}, {"logits": ("float32", (2,))})
        >>> store.write(bytes(16), {"logits": np.ones((3, 2))})
        >>> store.read([bytes(16)])["logits"].shape
        torch.Size([3, 2])
        >>> store.close()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        description: dict[str, Any],
        fields: Mapping[str, tuple[str, tuple[int, ...]]],
        rank: int = 0,
    ) -> None:
        self.folder, self.rank, self.fields = Path(folder), rank, dict(fields)
        told = json.dumps([FORMAT, description, {name: list(field) for name, field in fields.items()}], sort_keys=True)
        self._header = _MAGIC + hashlib.blake2b(told.encode(), digest_size=16).digest()
        self._entry = struct.Struct(f"<{SIZE}sq{len(self.fields)}qII")
        self._item_bytes = [np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in self.fields.values()]
        self._describe(description)
        self._copies: dict[bytes, list[_Copy]] = {}
        self._seen: dict[str, int] = {}  # of each shard: the number of entries that need not be read again
        self._strange: set[str] = set()
        self._writer: _Writer | None = None
        self.refresh()

    def _describe(self, description: dict[str, Any]) -> None:
        check_description(self.folder, description)
        if not (self.folder / FILE).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / FILE, json.dumps({"format": FORMAT} | description, indent=1))

    def _path(self, shard: str, name: str) -> Path:
        return self.folder / f"{shard}.{name}"

    def refresh(self) -> None:
        """Learn of the rows that all processes have written so far."""
        for path in sorted(self.folder.glob("*.index")):
            shard = path.name.removesuffix(".index")
            if shard not in self._strange and is_file(path) and is_file(self._path(shard, "rows")):
                with path.open("rb") as file:
                    self._read_index(shard, file)

    def _read_index(self, shard: str, file: BinaryIO) -> None:
        if shard not in self._seen:
            header = file.read(len(self._header))
            if len(header) < len(self._header):
                return  # it is being made
            if header != self._header:
                self._strange.add(shard)
                _log.warning("Teacher cache at %s: %s is of another cache and is not read.", self.folder, file.name)
                return
            self._seen[shard] = 0
        size, width = self._path(shard, "rows").stat().st_size, self._entry.size
        while True:
            seen = at = self._seen[shard]
            file.seek(len(self._header) + at * width)
            content = file.read(_ENTRIES_AT_A_TIME * width)
            for start in range(0, len(content) - width + 1, width):
                at += 1
                entry = content[start : start + width]
                key, first, *counts, checksum, of_entry = self._entry.unpack(entry)
                # What a broken disk or a copy on the way has not got to the end of is not there.
                if zlib.crc32(entry[:-4]) != of_entry or first < 0 or min(counts, default=0) < 0:
                    continue
                copy = _Copy(shard, first, tuple(counts), checksum)
                if first + self._length(copy) <= size:
                    self._copies.setdefault(key, []).append(copy)
                    self._seen[shard] = at
            if self._seen[shard] == seen:
                return

    def _length(self, copy: _Copy) -> int:
        return sum(count * size for count, size in zip(copy.counts, self._item_bytes, strict=True))

    def __contains__(self, key: bytes) -> bool:
        return key in self._copies

    def __len__(self) -> int:
        return len(self._copies)

    def write(self, key: bytes, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Append a row.

        Args:
            key: Of 16 bytes.
            arrays: Shape ``[items, ...]`` for each field.

        Raises:
            OSError: If the disk is full, or broken; the error names the file.
        """
        if key in self._copies:
            return
        # A process that was forked writes to files of its own too.
        if self._writer is None or self._writer.process != os.getpid():
            self._writer = _Writer(self.folder, f"{self.rank}-{secrets.token_hex(8)}", self._header)
            self._seen[self._writer.shard] = 0
        made = [np.ascontiguousarray(arrays[name], dtype=kind) for name, (kind, _) in self.fields.items()]
        assert all(
            array.shape[1:] == tuple(shape) for array, (_, shape) in zip(made, self.fields.values(), strict=True)
        )
        row, counts = b"".join(array.tobytes() for array in made), tuple(len(array) for array in made)
        copy = _Copy(self._writer.shard, self._writer.end, counts, zlib.crc32(row))
        entry = self._entry.pack(key, copy.start, *counts, copy.checksum, 0)[:-4]
        try:
            self._writer.append(row, entry + struct.pack("<I", zlib.crc32(entry)))
        except OSError:
            self._writer = None  # where it ends is not known any more
            raise
        self._copies[key] = [copy]
        self._seen[copy.shard] += 1

    def read(self, keys: Sequence[bytes], counts: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
        """The items of some rows, one row after the other, by field.

        Args:
            keys: Of the rows.
            counts: How many items of a field each row must have, by name, as far as that is known.

        Raises:
            DamagedRows: If bytes are not those that were written. The store does not hold the row then.
        """
        parts: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in self.fields}
        damaged = 0
        # Read and not mapped: a mapped file that somebody cuts off ends the process.
        with ExitStack() as opened:
            files: dict[str, Any] = {}
            for row, key in enumerate(keys):
                wanted = tuple(counts[name][row] if counts and name in counts else None for name in self.fields)
                copies = self._copies.get(key, [])
                while copies:
                    shard = copies[0].shard
                    if shard not in files:
                        files[shard] = opened.enter_context(self._path(shard, "rows").open("rb", buffering=0))
                    if (found := self._bytes(files[shard], copies[0], wanted)) is not None:
                        break
                    _log.warning("Teacher cache at %s: a row of %s.rows is damaged.", self.folder, shard)
                    copies.pop(0)
                if not copies:
                    self._copies.pop(key, None)
                    damaged += 1
                    continue
                assert found is not None  # a copy is left
                left = memoryview(found)
                for name, count, size in zip(self.fields, copies[0].counts, self._item_bytes, strict=True):
                    kind, shape = self.fields[name]
                    parts[name].append(np.frombuffer(left[: count * size], kind).reshape(count, *shape))
                    left = left[count * size :]
        if damaged:
            raise DamagedRows(
                f"Expected the rows of the cache at {self.folder} to be as they were written, but got {damaged} with "
                "another checksum. Ask the teacher again, or fill another folder; the disk may be broken."
            )
        return {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in parts.items()}

    def _bytes(self, file: Any, copy: _Copy, wanted: tuple[int | None, ...]) -> bytes | None:
        """A row as it was written; None if it is not."""
        if any(count not in (None, own) for count, own in zip(wanted, copy.counts, strict=True)):
            return None
        file.seek(copy.start)
        found: bytes = file.read(self._length(copy))
        return found if len(found) == self._length(copy) and zlib.crc32(found) == copy.checksum else None

    def bytes_of(self, keys: Iterable[bytes]) -> int:
        """Bytes on disk of some rows."""
        return sum(self._length(self._copies[key][0]) for key in keys)

    def check_room(self, needed: int) -> None:
        """Refuse to begin what the disk has no room for.

        Args:
            needed: Bytes that are still to be written, by all processes.

        Raises:
            ValueError: If the disk has fewer free.
        """
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"Expected argument `path` to be on a disk with room for the cache, about {needed / 1e9:.2f} GB, but "
                f"got {free / 1e9:.2f} GB free at {self.folder}. Keep fewer classes (`top_k`), use `dtype='float16'`, "
                "or give another path."
            )

    def close(self) -> None:
        """Close the files that were written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Writer:
    """The two files of a shard, which this process alone writes."""

    def __init__(self, folder: Path, shard: str, header: bytes) -> None:
        self.shard, self.process, self.end = shard, os.getpid(), 0
        self._rows = (folder / f"{shard}.rows").open("xb", buffering=0)
        self._index = (folder / f"{shard}.index").open("xb", buffering=0)
        self._write(self._index, header)

    def append(self, row: bytes, entry: bytes) -> None:
        self._write(self._rows, row)
        self.end += len(row)
        self._write(self._index, entry)

    @staticmethod
    def _write(file: Any, content: bytes) -> None:
        left = memoryview(content)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, file.name) from error

    def close(self) -> None:
        self._rows.close()
        self._index.close()
