"""A teacher's signals on disk, found again by the content of the rows they belong to."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from lightning_distill import tasks

_META = "cache.json"
_KEY = 16


class SignalStore:
    """Arrays by row, appended once and read through memory maps; each process writes files of its own.

    A row is known by a hash of its content (see :func:`row_keys`), never by where or when it came. What is in the index
    is whole: its arrays were written before it, and an array without an index entry, which a killed process leaves, is
    written over by the next one.

    Args:
        folder: Where; made where it is not.
        description: What the signals are and whose: JSON. It must be that of the store that is there.
        fields: Type and shape of one item of each array, by name.
        rank: Number of the process.

    Raises:
        ValueError: If the folder holds another store; the message names what differs.

    Example:
        >>> import tempfile, numpy as np
        >>> from lightning_distill.cache import SignalStore
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
        self._describe(description)
        # Of each row: its shard, and for each field the first item and the number of items.
        self._rows: dict[bytes, tuple[int, list[tuple[int, int]]]] = {}
        self._known: dict[int, int] = {}
        self._maps: dict[tuple[int, str], np.memmap[Any, Any]] = {}
        self._files: list[BinaryIO] = []
        self._ends: list[int] = []
        self.refresh()

    def _begin(self) -> None:
        """Open this process's files at the end of what is whole in them."""
        mine = [places for shard, places in self._rows.values() if shard == self.rank]
        self._ends = [max((sum(places[i]) for places in mine), default=0) for i in range(len(self.fields))]
        sizes = [end * self._item_bytes(name) for name, end in zip(self.fields, self._ends, strict=True)]
        sizes.append(self._known.get(self.rank, 0) * self._width)
        for name, size in zip((*self.fields, "index"), sizes, strict=True):
            self._files.append(self._path(self.rank, name).open("ab"))
            self._files[-1].truncate(size)

    @property
    def _width(self) -> int:
        return _KEY + 16 * len(self.fields)

    def _describe(self, description: dict[str, Any]) -> None:
        path = self.folder / _META
        if path.exists():
            check_description(self.folder, description)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f"{_META}.{self.rank}")
        written.write_text(json.dumps(description, indent=1))
        written.replace(path)

    def _path(self, shard: int, name: str) -> Path:
        return self.folder / f"{shard}.{name}"

    def _item_bytes(self, name: str) -> int:
        kind, shape = self.fields[name]
        return int(np.dtype(kind).itemsize * np.prod(shape, dtype=np.int64))

    def refresh(self) -> None:
        """Learn of the rows that all processes have written so far."""
        for path in self.folder.glob("*.index"):
            shard = int(path.stem)
            known, content = self._known.get(shard, 0), path.read_bytes()
            for start in range(known * self._width, len(content) - self._width + 1, self._width):
                entry = content[start : start + self._width]
                numbers = np.frombuffer(entry[_KEY:], np.int64).reshape(-1, 2).tolist()
                places = [(first, count) for first, count in numbers]
                # What a broken disk or a copy on the way has not got to the end of is not there.
                if not all(self._holds(shard, n, sum(place)) for n, place in zip(self.fields, places, strict=True)):
                    break
                self._rows.setdefault(entry[:_KEY], (shard, places))
                self._known[shard] = start // self._width + 1

    def _holds(self, shard: int, name: str, items: int) -> bool:
        path = self._path(shard, name)
        return path.exists() and path.stat().st_size >= items * self._item_bytes(name)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def write(self, key: bytes, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Append a row.

        Args:
            key: Of 16 bytes.
            arrays: Shape ``[items, ...]`` for each field.
        """
        if key in self._rows:
            return
        if not self._files:
            self._begin()
        places = []
        for i, (name, (kind, shape)) in enumerate(self.fields.items()):
            array = np.ascontiguousarray(arrays[name], dtype=kind)
            assert array.shape[1:] == tuple(shape)
            self._files[i].write(array.tobytes())
            self._files[i].flush()
            places.append((self._ends[i], len(array)))
            self._ends[i] += len(array)
        self._files[-1].write(key + np.array(places, np.int64).tobytes())
        self._files[-1].flush()
        self._rows[key] = self.rank, places
        self._known[self.rank] = self._known.get(self.rank, 0) + 1

    def read(self, keys: Iterable[bytes]) -> dict[str, Tensor]:
        """The items of some rows, one row after the other, by field."""
        rows = [self._rows[key] for key in keys]
        found = {}
        for i, name in enumerate(self.fields):
            parts = []
            for shard, places in rows:
                first, count = places[i]
                parts.append(self._map(shard, name, first + count)[first : first + count])
            found[name] = torch.from_numpy(np.concatenate(parts))
        return found

    def _map(self, shard: int, name: str, items: int) -> "np.ndarray[Any, Any]":
        kind, shape = self.fields[name]
        if items == 0:
            return np.empty((0, *shape), kind)
        if (shard, name) not in self._maps or len(self._maps[shard, name]) < items:
            path = self._path(shard, name)
            length = path.stat().st_size // self._item_bytes(name)
            self._maps[shard, name] = np.memmap(path, kind, "r", shape=(length, *shape))
        return self._maps[shard, name]

    def bytes_of(self, keys: Iterable[bytes]) -> int:
        """Bytes on disk of some rows."""
        places = [self._rows[key][1] for key in keys]
        return sum(self._item_bytes(name) * sum(place[i][1] for place in places) for i, name in enumerate(self.fields))

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
        """Close the files."""
        for file in self._files:
            file.close()
        self._files.clear()
        self._maps.clear()


def row_keys(batch: Any, mask: Tensor | None) -> list[bytes]:
    """A hash of each row's content: of its inputs as far as they are real, and of which of its items count.

    Padding is left out, so a row has the same key in every batch.

    Args:
        batch: A mapping with tensors, or a pair ``(inputs, labels)``.
        mask: Bool ``[B, T]``, the items that count, or None.

    Returns:
        One key of 16 bytes a row.

    Example:
        >>> import torch
        >>> from lightning_distill.cache import row_keys
        >>> short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2)}
        >>> padded = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> row_keys(short, None) == row_keys(padded, None)
        True
    """
    batch = tasks.batch_of("teacher", batch)
    inputs = (
        {key: value for key, value in batch.items() if key not in ("labels", "attention_mask")}
        if isinstance(batch, Mapping)
        else {"": batch[0] if isinstance(batch, (tuple, list)) else batch}
    )
    arrays = {name: _array(value) for name, value in sorted(inputs.items()) if isinstance(value, Tensor)}
    real, counts = (None if x is None else x.cpu().numpy() for x in (tasks.token_mask(batch), mask))
    keys = []
    for row in range(len(next(iter(arrays.values())))):
        digest = hashlib.blake2b(digest_size=_KEY)
        for name, array in arrays.items():
            of_row = array[row]
            if real is not None and of_row.shape[:1] == real[row].shape:
                of_row = of_row[real[row]]
            digest.update(f"{name}:{of_row.dtype}:{of_row.shape}".encode() + np.ascontiguousarray(of_row).tobytes())
        if counts is not None:
            digest.update(np.flatnonzero(counts[row]).tobytes())
        keys.append(digest.digest())
    return keys


def _array(value: Tensor) -> "np.ndarray[Any, Any]":
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def model_fingerprint(model: nn.Module) -> str:
    """A hash of a model's class and of every weight's name, type, shape and content."""
    if (of_cache := getattr(model, "cached_fingerprint", None)) is not None:
        return str(of_cache)
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=_KEY)
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous()
            digest.update(f"{name}:{array.dtype}:{list(array.shape)}".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().data if array.numel() else b"")
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """A hash of a tokenizer's words; None without one."""
    if tokenizer is None:
        return None
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(words.encode(), digest_size=_KEY).hexdigest()


def stored_fields(folder: str | os.PathLike[str]) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """The fields of a store that is there; None where there is none."""
    if not (Path(folder) / _META).exists():
        return None
    fields = json.loads((Path(folder) / _META).read_text())["fields"]
    return {name: (kind, tuple(shape)) for name, (kind, shape) in fields.items()}


def check_description(folder: str | os.PathLike[str], description: dict[str, Any]) -> None:
    """Refuse a store that is there if it is of another teacher, tokenizer or other settings.

    Args:
        folder: Of the store; one that is not there yet is not refused.
        description: All that the store is to be, or what is known of it so far.

    Raises:
        ValueError: If it is another's; the message names what differs.
    """
    path = Path(folder) / _META
    if not path.exists():
        return
    there, wanted = json.loads(path.read_text()), json.loads(json.dumps(description))
    differ = sorted(key for key in wanted if there.get(key) != wanted[key])
    if differ:
        told = "; ".join(f"`{key}` is {there.get(key)!r} and not {wanted[key]!r}" for key in differ)
        raise ValueError(
            f"Expected argument `path` to be a cache of this teacher, tokenizer and settings, but got one in which "
            f"{told}: {folder}. Fill it for the same objectives and settings, give another path, or delete the folder."
        )


def save_teacher(teacher: nn.Module, folder: Path) -> None:
    """Write a transformers teacher's config beside its signals, for :func:`cached_teacher`."""
    config: Any = getattr(teacher, "config", None)
    if isinstance(config, transformers.PretrainedConfig) and not (folder / "config.json").exists():
        written = config.to_dict() | {"architectures": [type(teacher).__name__.removeprefix("FSDP")]}
        (folder / "config.json").write_text(json.dumps(written, indent=1, default=str))


def cached_teacher(folder: str | os.PathLike[str]) -> nn.Module:
    """A teacher without weights, in whose place a finished cache answers.

    Args:
        folder: Of the cache.

    Returns:
        The teacher's class with its config and no parameters.

    Raises:
        ValueError: If there is no cache, or its teacher was no transformers model.
    """
    folder = Path(folder)
    if not (folder / _META).exists() or not (folder / "config.json").exists():
        raise ValueError(
            f"Expected argument `path` to be the cache of a transformers teacher, but got {folder}. Fill one first: "
            "`lightning-distill cache`."
        )
    teacher = bare(transformers.AutoConfig.from_pretrained(folder))
    teacher.cached_fingerprint = json.loads((folder / _META).read_text())["teacher"]
    return teacher


def bare(config: Any) -> nn.Module:
    """The transformers model that a config describes, without a parameter or a buffer: nothing to move, send or train.

    Args:
        config: With the name of the class in ``architectures``.

    Returns:
        A model that knows its layers and cannot run.
    """
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, config.architectures[0])(config)
    for module in model.modules():
        module._parameters = dict.fromkeys(module._parameters)
        module._buffers = dict.fromkeys(module._buffers)
    return model
