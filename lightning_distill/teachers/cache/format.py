"""What a cache says of itself: whose signals it keeps, and in which form. None of it is trusted unread."""

import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE = "cache.json"
#: The form of the files beside it; the first had no such number.
FORMAT = 2

Fields = dict[str, tuple[str, tuple[int, ...]]]

_TYPES = ("float16", "float32", "float64", "int32", "int64")
_LARGEST_FILE, _MOST_ITEMS = 2**22, 2**31


def read_json(path: Path) -> dict[str, Any]:
    """A mapping from a small file of JSON.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds anything else.
    """
    if not is_file(path):
        raise FileNotFoundError(f"there is no file {path.name}")
    with path.open("rb") as file:
        content = file.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise ValueError(f"{path.name} has more than {_LARGEST_FILE} bytes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON ({shortly(str(error))})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return found


def is_file(path: Path) -> bool:
    """Whether there is an ordinary file: a pipe would be waited for, and a device has no end."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def write_whole(path: Path, content: str) -> None:
    """Write a file that another process sees whole or not at all."""
    written = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    written.write_text(content)
    written.replace(path)


def shortly(value: Any, length: int = 100) -> str:
    """A value, or a text, in one line of a message."""
    said = value if isinstance(value, str) and value.isprintable() else repr(value)
    return said if len(said) <= length else f"{said[:length]}..."


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What a cache says of itself; None where there is none.

    Args:
        folder: Of the cache.

    Raises:
        ValueError: If it cannot be read, was written by an earlier version, or tells of types and shapes that no cache
            has.
    """
    folder = Path(folder)
    try:
        (folder / FILE).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = read_json(folder / FILE)
    except (OSError, ValueError) as error:
        raise _refused(folder, f"whose description cannot be read: {error}") from error
    if found.get("format") != FORMAT:
        raise _refused(folder, f"written in the format {shortly(found.get('format', 1))} of another version")
    if (wrong := _wrong_fields(found.get("fields"))) is not None:
        raise _refused(folder, f"whose fields are {wrong}")
    if not isinstance(found.get("teacher", ""), str):
        raise _refused(folder, f"whose teacher is {shortly(found['teacher'])}")
    return found


def _refused(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"Expected argument `path` to be a teacher cache of this version, but got one {what}: {folder}. Fill it again: "
        "delete the folder, or give another path."
    )


def _wrong_fields(fields: Any) -> str | None:
    if fields is None:
        return None
    if not isinstance(fields, dict):
        return shortly(fields)
    for name, field in fields.items():
        kind, shape = field if isinstance(field, list) and len(field) == 2 else (None, None)
        sizes = shape if isinstance(shape, list) else [None]
        if not (re.fullmatch(r"[A-Za-z0-9_]{1,64}", name) and isinstance(kind, str) and kind in _TYPES):
            return shortly({name: field})
        items = 1
        for size in sizes:
            if type(size) is not int or not 0 <= size < _MOST_ITEMS:
                return shortly({name: field})
            items *= size
        if items >= _MOST_ITEMS:
            return shortly({name: field})
    return None


def stored_fields(folder: str | os.PathLike[str]) -> Fields | None:
    """The fields of a cache that is there; None where there is none."""
    description = read_description(folder)
    if description is None:
        return None
    return {name: (kind, tuple(shape)) for name, (kind, shape) in (description.get("fields") or {}).items()}


def check_description(folder: str | os.PathLike[str], description: Mapping[str, Any]) -> None:
    """Refuse a folder that cannot be a cache, or that is one of another teacher, tokenizer or other settings.

    Args:
        folder: Of the cache; one that is not there yet, or is empty, is not refused.
        description: All that the cache is to be, or what is known of it so far.

    Raises:
        ValueError: If it is another's; the message names what differs. If it holds other files, is no folder, or
            cannot be written.
    """
    check_folder(folder)
    there = read_description(folder)
    if there is None:
        return
    wanted = json.loads(json.dumps(description))
    differ = sorted(key for key in wanted if there.get(key) != wanted[key])
    if differ:
        told = "; ".join(f"`{key}` is {shortly(there.get(key))} and not {shortly(wanted[key])}" for key in differ)
        raise ValueError(
            f"Expected argument `path` to be a cache of this teacher, tokenizer and settings, but got one in which "
            f"{told}: {folder}. Fill it for the same objectives and settings, give another path, or delete the folder."
        )


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a path where no cache can be made, before anything is.

    Args:
        folder: Of the cache, or where one is to be.

    Raises:
        ValueError: If it is no folder, cannot be written, or holds files that are not a cache's.
    """
    path = Path(folder)
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # whatever else is wrong with it
        nearest = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if not nearest.is_dir():
            wrong = f"{nearest} is no folder"
        elif os.path.lexists(path / FILE):
            wrong = None  # one that is full need not be written
        elif not os.access(nearest, os.W_OK | os.X_OK):
            wrong = f"{nearest} cannot be written"
        else:
            with tempfile.TemporaryDirectory(prefix=".", dir=nearest):
                pass  # a file system may refuse what its rights allow
            names = [file.name for file in path.iterdir()] if nearest == path else []
            others = sorted(name for name in names if not name.startswith((".", FILE)))
            # Another process may have made the cache meanwhile; its description is there before all else.
            made = os.path.lexists(path / FILE)
            wrong = f"it holds other files, such as {others[0]!r}" if others and not made else None
    except (OSError, ValueError) as error:
        wrong = str(error)
    if wrong is not None:
        raise ValueError(
            f"Expected argument `path` to be a cache, or a new folder for one, but got {os.fspath(folder)!r}: {wrong}. "
            "Give another path."
        )
