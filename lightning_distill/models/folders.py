"""Folders that are written whole or not at all, and never in the place of anything that somebody else wrote."""

import ctypes
import glob
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

#: Lists the files of a folder that this library wrote, with a checksum of each.
MANIFEST = "lightning_distill.json"
_Path = str | os.PathLike[str]


def check_folder(folder: _Path, argument: str = "folder", *, sources: Iterable[_Path] = ()) -> Path:
    """Refuse a folder that may not be written: ask before the work whose result goes there.

    A folder may be written if it is not there, is empty, or holds only files that this library wrote and nobody has
    changed since, as ``lightning_distill.json`` in it says.

    Args:
        folder: Where something is to be written.
        argument: What the folder is called where the user gave it, for the error.
        sources: Folders that are read for it and must stay, such as that of the model.

    Returns:
        The folder, absolute, links resolved.

    Raises:
        ValueError: If it is a file, the working folder or a parent of it, a source or a parent of one, cannot be
            written, or holds anything else.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_distill.models.folders import check_folder
        >>> with tempfile.TemporaryDirectory() as home:
        ...     _ = Path(home, "thesis.txt").write_text("years of work")
        ...     check_folder(home)
        Traceback (most recent call last):
        ValueError: Expected argument `folder` to be a new folder, or one with nothing but what lightning-distill
        wrote there, but got ..., which holds thesis.txt. Name another folder.
    """
    given = os.fspath(folder)
    try:
        path = Path(given).resolve()
        wrong = _what_is_wrong(path, [Path(source).resolve() for source in sources])
    except (OSError, RuntimeError, ValueError) as error:  # a name too long or with a NUL, a loop of links, no rights
        wrong = f"which cannot be read: {error}"
    if wrong:
        raise ValueError(
            f"Expected argument `{argument}` to be a new folder, or one with nothing but what lightning-distill wrote "
            f"there, but got {given}, {wrong}. Name another folder."
        )
    return path


def _what_is_wrong(path: Path, sources: list[Path]) -> str | None:
    """Why a folder may not be written; None where it may."""
    if path.exists() and not path.is_dir():
        return "which is a file"
    # The working folder may be gone; then nothing can be above it.
    if Path().exists() and Path().resolve().is_relative_to(path):
        return "which is the working folder or holds it"
    if any(source.is_relative_to(path) for source in sources):
        return "which is the model that is read, or holds it"
    there = next(parent for parent in path.parents if parent.exists())
    if not there.is_dir():
        return f"and {there} is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"and {there} cannot be written"
    if not path.exists():
        return None
    if path.is_mount():
        return "where a disk is mounted, which cannot be swapped; a folder inside it can"
    foreign = _foreign(path)
    return None if foreign is None else f"which holds {foreign}"


def _foreign(folder: Path) -> str | None:
    """The first thing in a folder that this library did not write, or that was changed since; None where all is its."""
    files = _manifest(folder)
    ours = {str(parent) for name in files for parent in Path(name).parents}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or (path.is_dir() and name not in ours):
            return name
        if path.is_file() and name != MANIFEST:
            if name not in files:
                return name
            if files[name] != _checksum(path):
                return f"{name}, changed since it was written"
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    """Checksums of the files that were written, by name; empty where the folder is not of this library."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}


def _checksum(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def writing(
    folder: _Path, argument: str = "folder", *, sources: Iterable[_Path] = (), keep: bool = False
) -> Iterator[Path]:
    """Give an empty folder to write into, which takes the place of the one that is named once all is written.

    An error in the block leaves the earlier folder as it was, and nothing else. So does a kill, but for a hidden folder
    beside it (``.<name>.<number>.new``), which the next call removes. Earlier and new are exchanged in one step where
    the system can (Linux); elsewhere a kill between two steps leaves the earlier one hidden, and the next call gives it
    its name back.

    Args:
        folder: The folder; made if it is not there, with its parents.
        argument: See :func:`check_folder`, also for ``sources``.
        sources: Folders that must stay.
        keep: Whether files of the earlier folder that are not written anew stay in it.

    Yields:
        The folder to write into.

    Raises:
        ValueError: As :func:`check_folder`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_distill.models.folders import writing
        >>> target = Path(tempfile.mkdtemp(), "model")
        >>> for text in ("one", "two"):
        ...     with writing(target) as draft:
        ...         _ = (draft / "weights.txt").write_text(text)
        >>> (target / "weights.txt").read_text()
        'two'
    """
    sources = list(sources)
    path = check_folder(folder, argument, sources=sources)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(path)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    lock = draft.with_suffix(".lock")
    try:
        with FileLock(lock):  # who finds it free knows that the process is dead
            draft.mkdir()
            yield draft
            _seal(draft, path if keep else None)
            check_folder(folder, argument, sources=sources)  # writing took its time
            _swap(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        lock.unlink(missing_ok=True)


def _seal(draft: Path, earlier: Path | None) -> None:
    """Take over what is to stay, have all of it on the disk, and list it."""
    files = {}
    if earlier is not None:
        known = _manifest(earlier)
        for path in sorted(earlier.rglob("*")):
            name = path.relative_to(earlier).as_posix()
            if name in known and not (draft / name).exists():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                _link(path, draft / name)
                files[name] = known[name]
    for path in sorted(draft.rglob("*")):
        name = path.relative_to(draft).as_posix()
        if path.is_file() and name not in files:
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
            files[name] = _checksum(path)
    (draft / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def _link(earlier: Path, new: Path) -> None:
    """One file under two names where the disk can; neither is written to."""
    try:
        os.link(earlier, new)
    except OSError:
        shutil.copy2(earlier, new)


def _swap(draft: Path, folder: Path) -> None:
    """Give a draft its name; the earlier folder is then under the draft's, or nowhere."""
    if not folder.exists():
        draft.rename(folder)
        return
    shutil.copymode(folder, draft)
    if _exchange(draft, folder):
        return
    earlier = draft.with_suffix(".earlier")
    folder.rename(earlier)
    try:
        draft.rename(folder)
    except BaseException:
        earlier.rename(folder)
        raise
    shutil.rmtree(earlier)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or the disk cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    failed: int = renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange)
    return failed == 0


def _clean_up(folder: Path) -> None:
    """Put right what killed processes have left beside a folder."""
    mine = f".{glob.escape(folder.name)}.{'[0-9a-f]' * 8}"
    for earlier in sorted(folder.parent.glob(f"{mine}.earlier")):
        if not folder.exists():
            earlier.rename(folder)
        else:
            shutil.rmtree(earlier)
    for lock in folder.parent.glob(f"{mine}.lock"):
        try:
            with FileLock(lock, timeout=0):
                shutil.rmtree(lock.with_suffix(".new"), ignore_errors=True)
        except Timeout:
            continue  # somebody is writing
        lock.unlink(missing_ok=True)
