"""A store of signals: any number of writers, checked rows, and folders that are not what they say."""

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_distill.teachers.cache.store import DamagedRows, SignalStore

META = {"teacher": "a", "fields": {"logits": ["float32", [4]]}}
FIELDS: dict[str, tuple[str, tuple[int, ...]]] = {"logits": ("float32", (4,))}


def key(i: int) -> bytes:
    return i.to_bytes(16, "little")


def rows_of(i: int) -> np.ndarray[Any, Any]:
    return np.full((1 + i % 3, 4), i, np.float32)


def open_store(folder: Path, rank: int = 0) -> SignalStore:
    return SignalStore(folder, META, FIELDS, rank)


def fill(folder: Path, rows: list[int], start: Any = None) -> None:
    if start is not None:
        start.wait()
    store = open_store(folder)
    for i in rows:
        if key(i) not in store:
            store.write(key(i), {"logits": rows_of(i)})
        store.refresh()
    store.close()


def good_rows(folder: Path, rows: int) -> int:
    """Rows that are there; all of them right."""
    store, good = open_store(folder), 0
    for i in range(rows):
        if key(i) in store:
            assert store.read([key(i)])["logits"].numpy().tolist() == rows_of(i).tolist()
            good += 1
    return good


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_several_writers_and_a_reader_at_once(tmp_path: Path) -> None:
    context, order = multiprocessing.get_context("fork"), np.random.RandomState(0)
    start = context.Event()
    orders = [order.permutation(120).tolist() for _ in range(3)]
    writers = [context.Process(target=fill, args=(tmp_path / "cache", rows, start)) for rows in orders]
    for writer in writers:
        writer.start()
    start.set()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / "cache" / "cache.json").exists():
            good_rows(tmp_path / "cache", 120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert good_rows(tmp_path / "cache", 120) == 120


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_store_that_is_forked(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write(key(0), {"logits": rows_of(0)})

    def go_on(rows: range) -> None:
        for i in rows:
            store.write(key(i), {"logits": rows_of(i)})
            store.read([key(0), key(i)])

    child = multiprocessing.get_context("fork").Process(target=go_on, args=(range(1, 40),))
    child.start()
    go_on(range(20, 60))
    child.join()
    store.close()
    assert child.exitcode == 0
    assert good_rows(tmp_path, 60) == 60


@pytest.mark.parametrize("kind", ["rows", "index"])
@pytest.mark.parametrize("how", ["flipped", "cut", "zeros"])
def test_whatever_byte_changes_no_wrong_row_is_read(kind: str, how: str, tmp_path: Path) -> None:
    fill(tmp_path / "whole", list(range(3)))
    (file,) = (tmp_path / "whole").glob(f"*.{kind}")
    content = file.read_bytes()
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        if how == "flipped":
            changed[place] ^= 0x10
        elif how == "zeros":
            changed[place:] = bytes(len(content) - place)
        else:
            del changed[place:]
        file.write_bytes(changed)
        store = open_store(tmp_path / "whole")
        for i in range(3):
            if key(i) in store:
                try:
                    assert store.read([key(i)])["logits"].tolist() == rows_of(i).tolist()
                except DamagedRows:
                    assert key(i) not in store
        # The bytes from the place on are bad, and no others.
        entries = (len(content) - 24) // 3 if kind == "index" else None
        if how == "flipped" and entries and place >= 24:
            assert len(store) == 2


def test_a_damaged_row_is_read_from_another_copy(tmp_path: Path) -> None:
    stores = [open_store(tmp_path / "cache") for _ in range(2)]
    for store in stores:
        store.write(key(1), {"logits": rows_of(1)})
        store.close()
    files = sorted((tmp_path / "cache").glob("*.rows"))
    assert len(files) == 2
    files[0].write_bytes(bytes(files[0].stat().st_size))
    assert good_rows(tmp_path / "cache", 2) == 1
    files[1].write_bytes(bytes(files[1].stat().st_size))
    store = open_store(tmp_path / "cache")
    with pytest.raises(DamagedRows, match="got 2 with another checksum"):
        store.read([key(1), key(1)])
    # Asked again, it is written again and found from then on.
    store.write(key(1), {"logits": rows_of(1)})
    store.close()
    assert good_rows(tmp_path / "cache", 2) == 1


def test_shards_of_another_cache_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "mine", [0, 1])
    other = SignalStore(tmp_path / "other", {"teacher": "b"}, FIELDS)
    other.write(key(2), {"logits": rows_of(0)})
    other.close()
    for file in (tmp_path / "other").glob("0-*"):
        file.rename(tmp_path / "mine" / file.name)
    assert good_rows(tmp_path / "mine", 3) == 2
    assert "is of another cache and is not read" in caplog.text


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "cache")
    store.write(key(0), {"logits": rows_of(0)})
    writer = store._writer
    assert writer is not None

    class Full:
        name = str(tmp_path / "cache" / "full.rows")

        def write(self, content: Any) -> int:
            raise OSError(28, "No space left on device")

    rows, writer._rows = writer._rows, Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"No space left on device: '.*full\.rows'"):
        store.write(key(1), {"logits": rows_of(1)})
    rows.close()
    writer._index.close()
    store.write(key(1), {"logits": rows_of(1)})
    store.close()
    assert good_rows(tmp_path / "cache", 2) == 2


def test_a_cache_that_another_process_makes_meanwhile_is_no_folder_of_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("cache").mkdir()
    make = tempfile.TemporaryDirectory

    def slowly(*args: Any, **kwargs: Any) -> Any:
        # Between the look for a description and the look at the files, the other one has written a row.
        monkeypatch.undo()
        fill(tmp_path / "cache", [0])
        return make(*args, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", slowly)
    store = open_store(tmp_path / "cache", rank=1)
    assert key(0) in store
    store.close()
