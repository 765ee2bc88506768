"""Checkpoints that a crash cannot spoil: written whole or not at all, found again, never run."""

import errno
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint whole or not at all, whatever kills the process, and loads none that could run code.

    Lightning stages a checkpoint in the folder for temporary files and moves it over the earlier one; across file
    systems that move is a copy, and a kill in the middle of it leaves neither. Here the new checkpoint is a hidden file
    beside the earlier one (``.last.ckpt.tmp``) until it is on the disk (``fsync``), then takes its name in one step
    (``os.replace``). A kill leaves the earlier checkpoint, and at most the hidden file, which the next one overwrites.
    A full disk is an error that says so; the earlier checkpoint stays. It is written straight to the file, so that the
    host does not hold a second copy.

    Checkpoints are loaded with ``weights_only=True``, from http too, unless ``weights_only=False`` is passed by name.

    It composes: ``AsyncCheckpointIO(AtomicCheckpointIO())`` writes in a thread. With that one give ModelCheckpoint a
    constant file name or ``save_top_k`` above 1: Lightning removes the earlier file as soon as the new one is queued.
    Sharded checkpoints (``ModelParallelStrategy``, ``FSDPStrategy(state_dict_type="sharded")``) are folders that each
    process writes to, without any CheckpointIO: give them names that differ (``filename="{step}"``), so that none is
    written over. Remote paths are left to fsspec, whose stores replace an object whole.

    Example:
        >>> import lightning as L
        >>> from lightning_distill import AtomicCheckpointIO
        >>> trainer = L.Trainer(plugins=[AtomicCheckpointIO()], accelerator="cpu", logger=False)
        >>> type(trainer.strategy.checkpoint_io).__name__
        'AtomicCheckpointIO'
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint; a full disk is an OSError, and an earlier checkpoint of that name stays."""
        system, local = url_to_fs(str(path))
        if storage_options is not None or not isinstance(system, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(local)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.tmp")
        try:
            with draft.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(file)
            _sync_folder(file.parent)
        except BaseException as error:
            draft.unlink(missing_ok=True)
            cause = _os_error(error)
            if cause is not None and cause.errno in _NO_SPACE:
                left = f"The earlier {file.name} is intact." if file.exists() else "There is no earlier one."
                raise OSError(
                    cause.errno,
                    f"Expected room on the disk for the checkpoint {file}, but got: {cause.strerror}. {left} Free some "
                    "space, then resume from the newest checkpoint",
                ) from error
            raise

    def load_checkpoint(
        self, path: _PATH, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without running anything in it; ``weights_only=None`` stands for True.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or holds more than tensors and primitives.
        """
        with _refusing(path):
            return super().load_checkpoint(path, map_location, weights_only is not False)


def newest_checkpoint(folder: str | os.PathLike[str], *, ignoring: Path | None = None) -> Path | None:
    """The newest checkpoint of a folder that is whole; each newer one that is not is skipped with a warning.

    Every byte is compared with the checksums in the file. A checkpoint that holds more than tensors and primitives
    counts as damaged, and nothing in it is run.

    Args:
        folder: Where a ModelCheckpoint writes. Files and sharded checkpoints (folders) that end in ``.ckpt`` count.
        ignoring: One that is known not to be whole.

    Returns:
        The checkpoint, for ``trainer.fit(..., ckpt_path=...)``; None where there is none.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from lightning_distill import newest_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"global_step": 1}, Path(folder) / "one.ckpt")
        ...     newest_checkpoint(folder).name
        'one.ckpt'
    """
    found = sorted(Path(folder).glob("*.ckpt"), key=lambda path: (_key_file(path).stat().st_mtime_ns, path.name))
    for path in reversed([path for path in found if path != ignoring]):
        try:
            read_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"The checkpoint {path} is skipped. {error}", stacklevel=2)
        else:
            return path
    return None


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, mapped from its file, after a look at every checksum.

    Args:
        path: A file, or a folder of a sharded checkpoint, of which the part without tensors is read.

    Raises:
        ValueError: If it is damaged, or holds more than tensors and primitives.
    """
    file = _key_file(Path(path))
    with _refusing(file):
        with zipfile.ZipFile(file) as archive:
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"{broken} does not have the checksum it was written with")
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"Expected {path} to be a checkpoint, but got a {type(checkpoint).__name__} in it.")
    return checkpoint


def _key_file(path: Path) -> Path:
    """What is there only when all is: the file itself, or what Lightning writes last into a sharded checkpoint."""
    return path / "meta.pt" if path.is_dir() and (path / "meta.pt").exists() else path


@contextmanager
def _refusing(path: _PATH) -> Iterator[None]:
    """Turn what torch says of a damaged file or of a pickle with code in it into one error that says which."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected {path} to hold tensors and primitives only, but got: {_first_line(error)} Nothing in it was run."
        ) from error
    except (EOFError, zipfile.BadZipFile, IsADirectoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise ValueError(f"Expected {path} to be a whole checkpoint, but got: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _os_error(error: BaseException | None) -> OSError | None:
    """What the system said; torch's writer reports it as the cause of its own error, or before it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Have the new name on the disk too, where a folder can be opened (not on Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)
