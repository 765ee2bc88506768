"""The folder of a run: one run at a time, what that run is, and what of it is there to go on with."""

import hashlib
import json
import os
import shlex
import socket
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from torch.utils._pytree import tree_leaves

from lightning_distill.cli.parser import Flags
from lightning_distill.cli.screen import quiet, say
from lightning_distill.training.checkpoint import newest_checkpoint, read_checkpoint
from lightning_distill.training.stops import stops

_NOTES, _UNFINISHED, _LOCK, _HOLDER = "run.json", "unfinished.yaml", ".lock", ".lock.json"
# All that may be another in a resumed run, because nothing that is computed depends on it.
_FREE = (
    "resume",
    "data.num_workers",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.logger",
    "trainer.profiler",
)
# What transformers reads of a model's folder; a README or an optimizer's state beside it may change.
_READ = {".safetensors", ".json", ".txt", ".model", ".jinja"}
_held: dict[Path, Any] = {}


@contextmanager
def command() -> Iterator[None]:
    """What goes around the ``main`` of a recipe: signals end it with their codes, and its folder is free after it.

    What libraries say to everybody is not heard meanwhile, see :func:`lightning_distill.cli.screen.quiet`.

    Example:
        >>> from lightning_distill import cli
        >>> @cli.command()
        ... def main():
        ...     print("trains")
        >>> main()
        trains
    """
    with quiet(), stops("the same command with --resume"):
        earlier = set(_held)
        try:
            yield
        finally:
            for folder in set(_held) - earlier:
                _release(folder)


@rank_zero_only
def check_run(flags: Flags) -> None:
    """Refuse, before anything is read, a folder in which another run is at work, or ``--resume`` with other flags.

    Raises:
        ValueError: If it is so.
    """
    folder = flags.output_dir
    if (folder / _LOCK).exists() and folder.resolve() not in _held:
        _acquire(folder)
        _release(folder.resolve())
    if flags.resume and (folder / _NOTES).exists():
        was = _read_notes(folder / _NOTES)
        _check_same(folder, was, _describe(flags) | {"contents": was["contents"]})


def _acquire(folder: Path) -> None:
    """Hold a folder for this process, and note who that is. The system frees it when the process ends, however."""
    key = folder.resolve()
    if key in _held:
        return
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        (folder / _HOLDER).write_text(json.dumps(holder) + "\n")
    except Timeout:
        raise ValueError(
            f"--output_dir {folder} is in use by another run: {_holder(folder)}. Wait for it or stop it, or give this "
            "one another --output_dir"
        ) from None
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written: {error.strerror or error}") from error
    _held[key] = lock


def _release(folder: Path) -> None:
    (folder / _HOLDER).unlink(missing_ok=True)
    _held.pop(folder).release(force=True)


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / _HOLDER).read_text())
    except (OSError, ValueError):  # it has just begun, or just ended
        return "it has not said which"
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}, `{holder['command']}`"


@rank_zero_only
def begin_run(flags: Flags, data: Any = None, teacher: Any = None) -> None:
    """Hold the folder, and note what the run is; without ``--resume``, put away what another run has left.

    Args:
        flags: The parsed flags.
        data: The data module, whose rows are noted where they come from no file that the flags name.
        teacher: The teacher, of which is noted which commit of the hub it is.

    Raises:
        ValueError: If another run is at work in the folder, or ``--resume`` comes with another recipe, other flags, or
            other contents of the data and models than the run that is there.
    """
    folder = flags.output_dir
    _acquire(folder)
    notes = _describe(flags)
    notes["contents"] = _contents(notes["flags"]) | _contents_of_no_file(flags, data, teacher)
    checkpoints, file = folder / "checkpoints", folder / _NOTES
    there = checkpoints.exists() and any(checkpoints.rglob("*.ckpt"))
    if flags.resume:
        if file.exists():
            _check_same(folder, _read_notes(file), notes)
        elif there:
            raise ValueError(
                f"--resume: {folder} has checkpoints and no {_NOTES} that says of which run; without --resume the run "
                "begins anew and keeps them in checkpoints.earlier"
            )
        if not there:
            say(f"Nothing to resume in {folder}: the run begins.")
    elif there:
        earlier = _unused(folder / "checkpoints.earlier")
        checkpoints.rename(earlier)
        if file.exists():
            file.rename(earlier / _NOTES)
        cut = "a run that was cut" if (folder / _UNFINISHED).exists() else "an earlier run"
        say(f"{folder} holds {cut}. Its checkpoints are now in {earlier}: this run begins anew.")
    if not (flags.resume and file.exists()):
        _write(file, json.dumps(notes, indent=1))
    noted = flags.given.clone()
    noted.resume = False
    (folder / _UNFINISHED).write_text(flags.parser.dump(noted))


@rank_zero_only
def end_run(flags: Flags) -> None:
    """Note that nothing is left to resume, and let others in."""
    (flags.output_dir / _UNFINISHED).unlink(missing_ok=True)
    if flags.output_dir.resolve() in _held:
        _release(flags.output_dir.resolve())


def resume_from(flags: Flags, phase: str) -> Path | None:
    """The newest good checkpoint of a training, where ``--resume`` asks for it, and say which; None to begin it."""
    newest = newest_checkpoint(flags.output_dir / "checkpoints" / phase) if flags.resume else None
    if newest is not None:
        say(f"Resuming {phase.replace('_', ' ')} from {newest}, step {read_checkpoint(newest).get('global_step')}")
    return newest


def best_weights(folder: Path, best: str) -> dict[str, Any] | None:
    """The weights of a training's best epoch; where that checkpoint is damaged or gone, of the newest good one.

    Args:
        folder: Of the training's checkpoints.
        best: The path that the ModelCheckpoint knows; empty where it knows none.

    Returns:
        The state of the module; None where the training keeps no checkpoints.
    """
    if not best and not (folder / "best.ckpt").exists():
        return None
    wanted = Path(best or folder / "best.ckpt")
    try:
        return dict(read_checkpoint(wanted)["state_dict"])
    except (ValueError, FileNotFoundError) as error:
        path = newest_checkpoint(wanted.parent, ignoring=wanted)
        instead = "the last step is taken" if path is None else f"{path.name} is taken in its place"
        reason = "It is gone." if isinstance(error, FileNotFoundError) else str(error)
        said = f"The checkpoint of the best epoch of {folder.name} cannot be read: {instead}. {reason}"
        warnings.warn(said, stacklevel=2)
    return None if path is None else dict(read_checkpoint(path)["state_dict"])


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _describe(flags: Flags) -> dict[str, Any]:
    """What a run is: the recipe, known by the name of its default folder, and the flags."""
    given = dict(_flat("", yaml.safe_load(flags.parser.dump(flags.given))))
    given["output_dir"] = str(flags.output_dir.resolve())  # Lightning's checkpoints name it, too
    kept = {name: value for name, value in given.items() if not name.startswith(_FREE)}
    notes = {"recipe": Path(flags.parser.get_default("output_dir")).name, "flags": kept}
    described: dict[str, Any] = json.loads(json.dumps(notes, default=str))  # as it will be read
    return described


def _contents(flags: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files and folders that the flags name as data and models."""
    named = [
        (name, Path(path))
        for name, value in flags.items()
        if name.partition(".")[0] in ("data", "model")
        for path in (value if isinstance(value, list) else [value])
        if isinstance(path, str) and path
    ]
    folders = [(name, path) for name, path in named if name.endswith("_file") and path.is_dir()]  # of pictures
    return {
        **{f"--{name} {file}": _digest_of(file) for name, path in named for file in _files(path)},
        **{f"--{name} {path}": _digest(_parts_of(path)) for name, path in folders},
    }


def _contents_of_no_file(flags: Flags, data: Any, teacher: Any) -> dict[str, str]:
    """Digests of what is read and is no file that a flag names: rows of the hub or of packages, a hub model."""
    found = {}
    if data is not None and not (flags.data.get("train_file") or flags.data.get("text_files")):
        rows = (tree_leaves(split[index]) for split in data._datasets.values() for index in range(len(split)))
        found["the rows of the data"] = _digest(leaf.numpy().tobytes() for row in rows for leaf in row)
    commit = getattr(getattr(teacher, "config", None), "_commit_hash", None)
    return found | ({"--model.teacher": commit} if commit else {})


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and "class_path" not in value:
        for name, item in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), item)
    else:
        yield prefix, value


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in _READ and file.is_file())
    return [path] if path.is_file() else []


def _parts_of(folder: Path) -> Iterator[bytes]:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield f"{file.relative_to(folder).as_posix()} {_digest_of(file)}\n".encode()


def _digest_of(file: Path) -> str:
    def blocks() -> Iterator[bytes]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                yield block

    return _digest(blocks())


def _write(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}.tmp")
    draft.write_text(text + "\n")
    draft.replace(file)


def _read_notes(file: Path) -> dict[str, Any]:
    try:
        notes: dict[str, Any] = json.loads(file.read_text())
        if {"recipe", "flags", "contents"} <= notes.keys():
            return notes
    except (ValueError, AttributeError):
        pass
    raise ValueError(
        f"--resume: {file} is damaged, so nobody knows what the run was; leave --resume out and begin anew"
    )


def _check_same(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    another = "another --output_dir begins another run, and without --resume this folder's begins anew"
    if was["recipe"] != now["recipe"]:
        raise ValueError(f"--resume: {folder} holds a run of {was['recipe']}, and this is {now['recipe']}; {another}")
    changed = [
        f"{name.rpartition('.')[2]} (--{name} is {_shown(here)} and was {_shown(there)})"
        for name, there, here in _differences(was["flags"], now["flags"])
    ]
    if changed:
        raise ValueError(
            f"--resume goes on with the flags of the run in {folder}, and these are others: {', '.join(changed)}; "
            f"{another}"
        )
    differing = [name for name, _, _ in _differences(was["contents"], now["contents"])]
    if differing:
        raise ValueError(
            f"--resume goes on with the data and models of the run in {folder}, and the contents of these have changed "
            f"since: {', '.join(differing)}; {another}"
        )


def _differences(was: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = sorted(was.keys() | now.keys())
    return [(name, was.get(name), now.get(name)) for name in names if was.get(name) != now.get(name)]


def _shown(value: Any) -> str:
    shown = json.dumps(value, default=str)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _unused(path: Path) -> Path:
    """The path, or with the first number from 2 that makes it a new one."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate
