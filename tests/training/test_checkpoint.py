"""Checkpoints: whole after a kill and on a full disk, small, and never a way to run somebody's code."""

import errno
import json
import os
import pickle
import resource
import runpy
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import safetensors.torch
import torch
import transformers
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

from lightning_distill import AtomicCheckpointIO, DistillationModule, newest_checkpoint
from lightning_distill.early_exit import EarlyExitModel
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.quantization import load
from lightning_distill.training.checkpoint import read_checkpoint
from tests.helpers.models import batch, bert

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
KILLS = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "kills.py"))
WEIGHTS = {"state_dict": {"w": torch.arange(50_000.0)}, "global_step": 1}


@pytest.fixture(autouse=True)
def _temporary_files_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder for temporary files is on another file system, where there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield


@pytest.mark.forks
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_at_any_time_leaves_a_checkpoint_at_most_one_interval_old(kills: int, tmp_path: Path) -> None:
    found = KILLS["kill_and_resume"](tmp_path / "run", AtomicCheckpointIO(), kills=kills, interval=2)
    assert (found["kills"], found["nothing_left"]) == (kills, 0)
    assert found["lost"] <= 2


@pytest.fixture
def small_files() -> Iterator[Callable[[], None]]:
    """Call it, and the system refuses to let a file grow beyond 100 kB, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(
    tmp_path: Path, small_files: Callable[[], None]
) -> None:
    path = tmp_path / "run" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(WEIGHTS, path)
    small_files()
    with pytest.raises(
        OSError, match=r"room on the disk for the checkpoint .*last.ckpt.*earlier last.ckpt is intact"
    ) as error:
        AtomicCheckpointIO().save_checkpoint({**WEIGHTS, "global_step": 2}, path)
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    with pytest.raises(OSError, match="There is no earlier one"):
        AtomicCheckpointIO().save_checkpoint(WEIGHTS, tmp_path / "run" / "other.ckpt")
    assert list((tmp_path / "run").iterdir()) == [path]
    assert newest_checkpoint(tmp_path / "run") == path
    assert read_checkpoint(path)["global_step"] == 1


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        path = tmp_path / "last.ckpt"
        AtomicCheckpointIO().save_checkpoint(WEIGHTS, path)
        with pytest.raises(OSError, match=f"{os.strerror(errno.ENOSPC)}.*intact"):
            AtomicCheckpointIO().save_checkpoint(WEIGHTS, path)
        assert newest_checkpoint(tmp_path) == path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_damaged_checkpoints_are_skipped_with_a_warning(tmp_path: Path) -> None:
    for number, name in enumerate(("good", "flipped", "cut", "empty")):
        AtomicCheckpointIO().save_checkpoint(WEIGHTS, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (number, number))
    whole = (tmp_path / "good.ckpt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for name, content in (("flipped", bytes(flipped)), ("cut", whole[:-1000]), ("empty", b"")):
        times = (tmp_path / f"{name}.ckpt").stat()
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        os.utime(tmp_path / f"{name}.ckpt", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / ".good.ckpt.tmp").write_bytes(whole[:10])  # what a kill leaves
    with pytest.warns(UserWarning, match="skipped") as caught:
        assert newest_checkpoint(tmp_path) == tmp_path / "good.ckpt"
    assert [str(w.message).split(".ckpt is skipped")[0].rsplit("/", 1)[1] for w in caught] == [
        "empty",
        "cut",
        "flipped",
    ]
    with pytest.raises(ValueError, match=r"cut.ckpt to be a whole checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(FileNotFoundError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")
    assert newest_checkpoint(tmp_path / "nowhere") is None


def fit(folder: Path, *callbacks: L.Callback, io: Any = None, ckpt_path: Path | None = None) -> L.Trainer:
    """Two steps of a student of 0.8 M parameters."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 1000}
    module = DistillationModule(bert(layers=4, **shape), bert(layers=3, **shape))
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, plugins=[io or AtomicCheckpointIO()], callbacks=list(callbacks),
    )  # fmt: skip
    rows = [{name: value[0] for name, value in batch("classification", 1, seed=seed).items()} for seed in range(4)]
    trainer.fit(module, DataLoader(rows, batch_size=2), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("averages", [False, True])
def test_a_checkpoint_is_as_large_as_the_student_and_its_optimizer(averages: bool, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "one")
    extra = [EMAWeightAveraging(use_buffers=False)] if averages else []
    trainer = fit(tmp_path, saves, *extra)
    student = trainer.lightning_module.student
    copies = 3 + averages  # weights and two moments of AdamW
    expected = copies * sum(parameter.numel() * 4 for parameter in student.parameters())
    size = (tmp_path / "one.ckpt").stat().st_size
    assert expected < size < 1.01 * expected
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert not [key for key in checkpoint["state_dict"] if "teacher" in key]


def test_it_works_with_links_and_with_a_thread(tmp_path: Path) -> None:
    saves = ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max", save_last="link"
    )
    fit(tmp_path, saves, io=AsyncCheckpointIO(AtomicCheckpointIO()))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "step=2.ckpt"
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert read_checkpoint(newest)["global_step"] == 2
    assert not list(tmp_path.glob(".*.tmp"))


class Bomb:
    """What a malicious pickle holds."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_malicious_pickle_named_as_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"state_dict": Bomb(mark), "global_step": 3}, tmp_path / "torch.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    for name in ("torch", "plain"):
        with pytest.raises(ValueError, match=f"{name}.ckpt"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / f"{name}.ckpt")
        with pytest.raises(ValueError, match=f"{name}.ckpt"):
            fit(tmp_path / "out", ckpt_path=tmp_path / f"{name}.ckpt")
    with pytest.warns(UserWarning, match="is skipped"):
        assert newest_checkpoint(tmp_path) is None
    assert not mark.exists()
    pickle.loads((tmp_path / "plain.ckpt").read_bytes())  # the test can fail: this is what would have happened
    assert mark.exists()


@pytest.mark.parametrize("read", [load_pretrained, load, EarlyExitModel.from_pretrained], ids=lambda f: f.__qualname__)
def test_a_malicious_pickle_named_as_a_model_does_not_run(read: Callable[[str], Any], tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = tmp_path / "model"
    bert().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    if read is load:
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"bert.embeddings.word_embeddings.weight": Bomb(mark)}, folder / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError), match=r"safetensors|\['bert.* are missing"):
        read(str(folder))
    assert not mark.exists()


def test_code_beside_a_model_does_not_run_and_nobody_is_asked(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    bert().save_pretrained(tmp_path / "model")
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Mine: pass\n"
    (tmp_path / "model" / "mine.py").write_text(code)
    config = transformers.BertConfig.from_pretrained(tmp_path / "model").to_dict()
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Mine"},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"`teacher`.*custom code"):
        DistillationModule(str(tmp_path / "model"), bert())
    assert not mark.exists()


def test_a_folder_cannot_name_a_function_to_call(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    described = {"class_path": "os.system", "init_args": {"command": f"touch {mark}"}}
    (tmp_path / "config.json").write_text(
        json.dumps({**described, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    safetensors.torch.save_file({}, str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match=r"os\.system"):
        load(tmp_path)
    assert not mark.exists()


def test_only_safetensors_leave_the_library(tmp_path: Path) -> None:
    DistillationModule(None, bert()).export(tmp_path / "student")
    assert {path.suffix for path in (tmp_path / "student").iterdir()} == {".json", ".safetensors"}
