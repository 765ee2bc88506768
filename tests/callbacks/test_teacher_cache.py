"""TeacherCache: the same losses as without it, whatever the order, the break or the number of processes."""

import copy
import dataclasses
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule, functional
from lightning_distill.__main__ import main
from lightning_distill.callbacks import EarlyExit, TeacherCache
from lightning_distill.cli import build_callbacks, text_parser
from lightning_distill.data import BucketBatchSampler, ResumableDataLoader, TextClassificationData
from lightning_distill.data.embedded import train_tokenizer
from lightning_distill.generation import OnPolicyDistillation
from lightning_distill.objectives import AttentionMap, HardLabel, HiddenState, Objective, SoftTarget
from lightning_distill.signals import head as vocabulary
from lightning_distill.signals.signals import Signals
from lightning_distill.teachers.cache import SignalStore, row_keys
from lightning_distill.teachers.ensemble import TeacherEnsemble
from tests.helpers.models import batch, bert, llama

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LOGITS: list[str] = ["logits"]


def soft() -> list[Objective]:
    return [SoftTarget(2.0, weight=0.7), HardLabel(weight=0.3)]


def pair(task: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    if task == "causal_lm":
        return llama(layers=3), llama()
    if task == "regression":
        return bert(num_labels=1, layers=3), bert(num_labels=1, **STILL)
    head = {"masked_lm": "MaskedLM", "token_classification": "TokenClassification"}.get(task, "SequenceClassification")
    return bert(head, num_labels=3, layers=3), bert(head, num_labels=3, **STILL)


class Shuffled(L.LightningDataModule):
    """Twelve rows, in another order and in other batches each epoch, padded to the longest of their batch."""

    def __init__(self, task: str, size: int = 4) -> None:
        super().__init__()
        whole = batch(task, rows=12, length=9, classes=3)
        self.rows = [{key: value[row] for key, value in whole.items()} for row in range(12)]
        self.size = size

    def _collate(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        made = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        longest = int(made["attention_mask"].sum(1).max())
        return {key: value[:, :longest] if value.ndim > 1 else value for key, value in made.items()}

    def train_dataloader(self) -> Any:
        return ResumableDataLoader(self.rows, BucketBatchSampler([9] * 12, self.size), collate_fn=self._collate)

    def val_dataloader(self) -> Any:
        return DataLoader(self.rows[:5], 5, collate_fn=self._collate)


class Fit(NamedTuple):
    weights: dict[str, torch.Tensor]
    logs: dict[str, torch.Tensor]
    module: DistillationModule
    trainer: L.Trainer


def fit(task: str, folder: Path, *callbacks: L.Callback, made: Any = soft, teacher: Any = None, **settings: Any) -> Fit:
    own, student = pair(task)
    module = DistillationModule(
        teacher or own, student, made(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    )
    ckpt_path = settings.pop("ckpt_path", None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    defaults = {"max_epochs": 3, "accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": folder}
    run = L.Trainer(**{**quiet, **defaults, **settings}, callbacks=list(callbacks))
    run.fit(module, datamodule=Shuffled(task), ckpt_path=ckpt_path)
    return Fit(module.student.state_dict(), dict(run.callback_metrics), module, run)


def assert_same(one: Fit, two: Fit, tolerance: float = 1e-6) -> None:
    for kind in ("logs", "weights"):
        first, second = getattr(one, kind), getattr(two, kind)
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("task", ["classification", "regression", "token_classification", "masked_lm", "causal_lm"])
def test_all_logits_give_the_training_without_a_cache(task: str, tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", top_k=None, dtype="float32")
    assert_same(fit(task, tmp_path), fit(task, tmp_path, cache))
    # Each row was asked for once, of training, validation and the sanity check before them, and then read.
    assert cache.misses == 12
    assert cache.hits == 3 * 12 + 4 * 5 - 12
    again = TeacherCache(tmp_path / "cache", top_k=None, dtype="float32")
    assert_same(fit(task, tmp_path), fit(task, tmp_path, again))
    assert again.misses == 0


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_all_classes_as_the_best_ones_are_all_logits(task: str, tmp_path: Path) -> None:
    whole = fit(task, tmp_path)
    assert_same(whole, fit(task, tmp_path, TeacherCache(tmp_path / "cache", top_k=64, dtype="float32")), 2e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_best_classes_and_the_mass_of_the_others(dtype: Any, tmp_path: Path) -> None:
    teacher, student = pair("causal_lm")
    module = DistillationModule(teacher, student, [SoftTarget(2.0), SoftTarget(1.0, name="at_1"), HardLabel()])
    data = batch("causal_lm")
    uncached = module.losses(data)
    signals = module.teacher_step(data)
    cache = TeacherCache(tmp_path / "cache", top_k=5, dtype=dtype)
    cache.attach(module)
    for _ in range(2):
        losses = module.losses(data)
        for name, temperature in (("soft_target", 2.0), ("at_1", 1.0)):
            best, classes = (signals.logits / temperature).log_softmax(-1).topk(5)
            student_signals = module.student_step(data)
            expected = functional.top_k_soft_target(
                student_signals.logits, best, classes, temperature=temperature, mask=signals.mask
            )
            torch.testing.assert_close(losses[name], expected, rtol=1e-6 if dtype == "float32" else 5e-3, atol=1e-6)
            # The other classes are one: it is a lower bound.
            assert losses[name] < uncached[name]
    assert (cache.hits, cache.misses) == (4, 4)
    cache.detach()
    torch.testing.assert_close(module.losses(data), uncached)


def test_chunks_and_cache_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [{"top_k": None}, {"top_k": 5}]
    for settings in caches:
        runs = []
        for words in (16_000, 10):
            monkeypatch.setattr(vocabulary, "LARGE", words)
            path = tmp_path / f"{words} {settings}"
            runs.append(fit("causal_lm", tmp_path, TeacherCache(path, dtype="float32", **settings)))
        assert_same(*runs)


def test_hidden_states(tmp_path: Path) -> None:
    made = lambda: [*soft(), HiddenState(weight=0.3)]  # noqa: E731
    for task in ("classification", "causal_lm"):
        cache = TeacherCache(tmp_path / task, ["logits", "hidden_states"], top_k=None, dtype="float32")
        whole = fit(task, tmp_path, made=made)
        assert_same(whole, fit(task, tmp_path, cache, made=made))
        # A layer of the teacher can be described without its weights.
        without = TeacherCache(tmp_path / task, ["logits", "hidden_states"], top_k=None, dtype="float32")
        assert_same(whole, fit(task, tmp_path, without, made=made, teacher=TeacherCache.teacher(tmp_path / task)))
        assert without.misses == 0


def test_the_teacher_is_not_loaded(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"top_k": None, "dtype": "float32"}
    whole = fit("causal_lm", tmp_path, TeacherCache(tmp_path / "cache", **settings))
    teacher = TeacherCache.teacher(tmp_path / "cache")
    assert not list(teacher.parameters())
    run = fit("causal_lm", tmp_path, TeacherCache(tmp_path / "cache", **settings), teacher=teacher)
    assert_same(whole, run)
    run.module.teacher = TeacherCache.teacher(tmp_path / "cache")
    cache = TeacherCache(tmp_path / "cache", **settings)
    cache.attach(run.module)
    with pytest.raises(ValueError, match=r"to hold every row, but 4 of a batch of 4 are not in it"):
        run.module.losses(batch("causal_lm", seed=77))
    cache.detach()
    with pytest.raises(ValueError, match="to be the cache of a transformers teacher"):
        TeacherCache.teacher(tmp_path)


class Changing(L.Callback):
    """Another token in each of so many rows from the second epoch on."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        for row in trainer.datamodule.rows[: self.rows]:  # type: ignore[attr-defined]
            row["input_ids"][0] = 20 + trainer.current_epoch


def test_data_that_change_are_asked_for_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightning.pytorch")
    # Validation that begins late is no change.
    fit("causal_lm", tmp_path, TeacherCache(tmp_path / "late"), check_val_every_n_epoch=2, num_sanity_val_steps=0)
    cache = TeacherCache(tmp_path / "some", top_k=None, dtype="float32")
    assert_same(fit("causal_lm", tmp_path, Changing(2)), fit("causal_lm", tmp_path, cache, Changing(2)))
    assert cache.misses == 12 + 3 * 2  # the sanity check sees the first rows as they were
    assert "was in it" not in caplog.text
    fit("causal_lm", tmp_path, TeacherCache(tmp_path / "all"), Changing(12))
    for epoch in (1, 2):
        assert f"none of the 12 rows of epoch {epoch} was in it" in caplog.text


def of_classes(names: str, top: str = "SequenceClassification") -> nn.Module:
    ids = {name: index for index, name in enumerate(names)}
    return bert(top, label2id=ids, id2label={index: name for name, index in ids.items()}, **STILL)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("task", ["classification", "token_classification"])
def test_a_cache_is_good_for_students_of_any_order_of_classes(task: Any, top_k: int | None, tmp_path: Path) -> None:
    head = "TokenClassification" if task == "token_classification" else "SequenceClassification"
    teacher, data = of_classes("abc", head), batch(task, classes=3)
    for turn, order in enumerate(("cab", "abc", "bca")):
        module = DistillationModule(teacher, of_classes(order, head), [SoftTarget(2.0)])
        plain = module.teacher_step(data).logits
        cache = TeacherCache(tmp_path / "cache", top_k=top_k, dtype="float32")
        cache.attach(module)
        read = module.teacher_step(data)
        cache.detach()
        assert (cache.misses > 0) is (turn == 0)
        counts = torch.ones(len(plain), dtype=torch.bool) if read.mask is None else read.mask
        if top_k is None:
            torch.testing.assert_close(read.logits[counts], plain[counts])
        else:
            best, classes = plain.div(2.0).log_softmax(-1).topk(2)
            assert torch.equal(read.top_k[2.0].classes[counts], classes[counts])
            torch.testing.assert_close(read.top_k[2.0].log_probs[counts], best[counts])


class OwnStep(DistillationModule):
    """A step of the user's own, in the student's order of classes, that does not come by the teacher's signals."""

    def teacher_step(self, batch: Any) -> Signals:
        return self.in_student_order(self.forwards.run("teacher", self.teacher, batch))


def test_a_step_of_the_users_own_is_kept_for_students_of_the_same_classes(tmp_path: Path) -> None:
    teacher, data = of_classes("abc"), batch("classification", classes=3)
    for order, misses in (("cab", 4), ("cab", 0), ("bca", None)):
        module = OwnStep(teacher, of_classes(order), [SoftTarget(2.0)])
        plain = module.teacher_step(data).logits
        cache = TeacherCache(tmp_path / "cache", top_k=None, dtype="float32")
        if misses is None:
            with pytest.raises(ValueError, match=r"to be a cache of this teacher.*`classes` is"):
                cache.attach(module)
            continue
        cache.attach(module)
        torch.testing.assert_close(module.teacher_source(data).logits, plain)
        cache.detach()
        assert cache.misses == misses


@pytest.mark.parametrize("kind", [DistillationModule, OwnStep])
def test_early_exit_learns_from_a_cache(kind: type[DistillationModule], tmp_path: Path) -> None:
    teacher, runs = of_classes("abc"), []
    for cached in (None, "after", "before", "after"):
        torch.manual_seed(0)
        module = kind(teacher, of_classes("cab"), soft())
        cache = TeacherCache(tmp_path / "cache", top_k=None, dtype="float32")
        ramps = EarlyExit(training="two_stage", teacher_weight=0.5)
        callbacks = {None: [ramps], "after": [ramps, cache], "before": [cache, ramps]}[cached]
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", enable_checkpointing=False, callbacks=callbacks, **quiet)
        trainer.fit(module, datamodule=Shuffled("classification"))
        assert not {"teacher_step", "teacher_signals", "training_step"} & vars(module).keys()
        runs.append(Fit(module.student.state_dict(), {}, module, trainer))
    assert cache.misses == 0
    for run in runs[1:]:
        assert_same(runs[0], run)


@pytest.mark.parametrize("ramps_first", [True, False])
def test_ramps_learn_of_the_best_classes_at_a_temperature_that_is_kept(tmp_path: Path, ramps_first: bool) -> None:
    """The cache keeps what the objectives of its start ask for; what joins later is told to come first."""
    module = DistillationModule(of_classes("abc"), of_classes("abc"), soft())
    both = [EarlyExit(teacher_weight=0.5, temperature=7.0), TeacherCache(tmp_path / "cache", top_k=2)]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = both if ramps_first else both[::-1]
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, callbacks=callbacks, **quiet)
    if ramps_first:
        trainer.fit(module, datamodule=Shuffled("classification"))
        return
    with pytest.raises(ValueError, match=r"kept for, \(.*\), but got 7.0. A callback .* stands before `TeacherCache`"):
        trainer.fit(module, datamodule=Shuffled("classification"))


class OfMapping(nn.Module):
    """Reads whatever a batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Any) -> torch.Tensor:
        if isinstance(x, Inputs):
            x = {"x": x.x}
        found = x["x"] if isinstance(x, dict) else sum(x)
        return self.head(found if isinstance(found, torch.Tensor) else found["y"])


@dataclasses.dataclass
class Inputs:
    x: torch.Tensor


X = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
NESTED = {
    "a mapping": ({"x": X}, torch.arange(4) % 3),
    "mappings in mappings": ({"x": {"y": X}}, torch.arange(4) % 3),
    "a pair": ((X, X + 1), torch.arange(4) % 3),
    "a list": [[X, X + 1, X + 2], torch.arange(4) % 3],
    "a dataclass": (Inputs(X), torch.arange(4) % 3),
    "texts beside": ({"x": X, "text": list("abcd"), "ids": [1, 2, 3, 4]}, torch.arange(4) % 3),
    "a mapping of mappings": {"x": {"x": X}, "label": [0, 1, 2, 0], "name": object()},
    "another name": {"image": {"x": X}, "label": torch.arange(4) % 3},
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_batches(name: str, tmp_path: Path) -> None:
    data = NESTED[name]
    module = DistillationModule(OfMapping(), OfMapping(), [SoftTarget(2.0)])
    plain = module.teacher_step(data).logits
    for misses in (4, 0):
        cache = TeacherCache(tmp_path / "cache", top_k=None, dtype="float32")
        cache.attach(module)
        torch.testing.assert_close(module.teacher_source(data).logits, plain)
        cache.detach()
        assert cache.misses == misses


def test_rows_that_are_damaged_are_asked_for_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, data = DistillationModule(*pair("causal_lm"), soft()), batch("causal_lm")
    plain = module.losses(data)

    def losses(misses: int) -> None:
        cache = TeacherCache(tmp_path / "cache", top_k=None, dtype="float32")
        cache.attach(module)
        try:
            torch.testing.assert_close(module.losses(data), plain)
        finally:
            cache.detach()
        assert cache.misses == misses

    losses(4)
    (file,) = (tmp_path / "cache").glob("*.rows")
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    content[-5] ^= 1
    file.write_bytes(content)
    losses(2)
    assert caplog.text.count(".rows is damaged") == 2
    losses(0)
    module.teacher = TeacherCache.teacher(tmp_path / "cache")
    losses(0)
    for file in (tmp_path / "cache").glob("*.rows"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match="to hold every row, but 4 of a batch of 4 are not in it, or damaged"):
        losses(0)


def test_a_teacher_that_takes_no_mask_reads_the_padding(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(input_ids, 9).float().mean(1)

    module = DistillationModule(Mean(), nn.Sequential(Mean(), nn.Linear(9, 9)), [SoftTarget(2.0)])
    cache = TeacherCache(tmp_path / "cache", top_k=None, dtype="float32")
    short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2)}
    padded = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    plain = [module.teacher_step(data).logits for data in (short, padded)]
    cache.attach(module)
    for data, logits in zip((short, padded), plain, strict=True):
        torch.testing.assert_close(module.teacher_step(data).logits, logits)
    cache.detach()


def test_one_answer_for_each_row(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x])

    module = DistillationModule(Twice(), nn.Linear(4, 4), [SoftTarget(2.0)])
    cache = TeacherCache(tmp_path / "cache", top_k=None)
    cache.attach(module)
    with pytest.raises(ValueError, match=r"to give logits of shape \[4, 'classes'\] for a batch, but got \[8, 4\]"):
        module.teacher_step((X, None))
    cache.detach()


def test_a_teacher_that_is_drawn_is_not_kept(tmp_path: Path) -> None:
    drawn = TeacherEnsemble([nn.Linear(4, 3), nn.Linear(4, 3)], "sample")
    with pytest.raises(ValueError, match="to be used with a teacher that says the same each time"):
        TeacherCache(tmp_path / "cache").attach(DistillationModule(drawn, nn.Linear(4, 3)))


def test_paths_where_no_cache_can_be_made(tmp_path: Path) -> None:
    module = DistillationModule(nn.Linear(4, 3), nn.Linear(4, 3))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, said in (
        ("file", "is no folder"),
        ("file/cache", "Not a directory"),
        ("full", "holds other files, such as 'thesis.txt'"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null byte"),
        ("loop", "is no folder"),
    ):
        with pytest.raises(ValueError, match=rf"`path` to be a cache, or a new folder for one, .*{said}"):
            TeacherCache(tmp_path / name).attach(module)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "full", "loop"]


@pytest.mark.parametrize("path", ["", "runs", "runs/student", "."])
def test_a_recipe_writes_no_cache_around_its_output(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = text_parser(None, output_dir="runs/student").parse_args([f"--teacher_cache.path={path}"])
    with pytest.raises(ValueError, match=r"`teacher_cache\.path` to be a folder of its own, but got "):
        build_callbacks(config, "student")


def test_accumulation(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", top_k=None, dtype="float32")
    plain = fit("causal_lm", tmp_path, accumulate_grad_batches=2)
    assert_same(plain, fit("causal_lm", tmp_path, cache, accumulate_grad_batches=2))


class Kill(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("torn", [0, 5])
def test_a_half_written_cache_goes_on(torn: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"top_k": None, "dtype": "float32"}
    child = multiprocessing.get_context("fork").Process(
        target=fit,
        args=("causal_lm", tmp_path, TeacherCache(tmp_path / "cache", **settings), Kill()),
        kwargs={"num_sanity_val_steps": 0},
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    # As a power cut leaves it: an index entry that is not whole, an array without its entry.
    for kind, size in (("index", torn), ("rows", 13 * torn)):
        (file,) = (tmp_path / "cache").glob(f"0-*.{kind}")
        with file.open("ab") as written:
            written.write(b"x" * size)
    cache = TeacherCache(tmp_path / "cache", **settings)
    assert_same(fit("causal_lm", tmp_path), fit("causal_lm", tmp_path, cache))
    assert cache.misses == 12 - 8


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", top_k=None, dtype="float32")
    run = fit("classification", tmp_path, cache, devices=2, strategy="ddp_fork")
    assert_same(fit("classification", tmp_path, devices=2, strategy="ddp_fork"), run)
    assert [path.name[:2] for path in sorted((tmp_path / "cache").glob("*.index"))] == ["0-", "1-"]
    # One process finds what two have written.
    alone = TeacherCache(tmp_path / "cache", top_k=None, dtype="float32")
    fit("classification", tmp_path, alone)
    assert alone.misses == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resuming_in_the_middle(tmp_path: Path) -> None:
    saved = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    settings: dict[str, Any] = {"top_k": None, "dtype": "float32"}
    whole = fit("causal_lm", tmp_path, saved, TeacherCache(tmp_path / "cache", **settings), enable_checkpointing=True)
    cache = TeacherCache(tmp_path / "cache", **settings)
    again = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    resumed = fit("causal_lm", tmp_path, again, cache, ckpt_path=tmp_path / "epoch=1.ckpt", enable_checkpointing=True)
    assert cache.misses == 0
    assert_same(whole, resumed)


def test_keys_are_of_the_content() -> None:
    data = batch("causal_lm", rows=3)
    mask = data["labels"] != -100
    keys = row_keys(data, mask)
    assert len(set(keys)) == 3
    wider = {key: torch.nn.functional.pad(x, (0, 4), value=-100 if key == "labels" else 0) for key, x in data.items()}
    assert row_keys(wider, wider["labels"] != -100) == keys
    order = torch.tensor([2, 0, 1])
    assert row_keys({key: x[order] for key, x in data.items()}, mask[order]) == [keys[2], keys[0], keys[1]]
    other = copy.deepcopy(data)
    other["input_ids"][1, 0] += 1
    assert [one == two for one, two in zip(row_keys(other, mask), keys, strict=True)] == [True, False, True]
    fewer = mask.clone()
    fewer[2, 1] = False
    assert [one == two for one, two in zip(row_keys(data, fewer), keys, strict=True)] == [True, True, False]


class _Words:
    def __init__(self, **words: int) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return self.words


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    teacher, student = pair("classification")
    data = batch("classification", classes=3)

    def losses(teacher: nn.Module, tokenizer: Any = None, **settings: Any) -> None:
        module = DistillationModule(copy.deepcopy(teacher), copy.deepcopy(student), soft(), tokenizer=tokenizer)
        cache = TeacherCache(tmp_path / "cache", **settings)
        cache.attach(module)
        try:
            module.losses(data)
        finally:
            cache.detach()

    losses(teacher)
    losses(teacher)
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        next(other.parameters()).flatten()[0] += 1e-3
    for change, named in (
        ({"teacher": other}, "teacher"),
        ({"teacher": teacher, "tokenizer": _Words(a=0)}, "tokenizer"),
        ({"teacher": teacher, "top_k": 2}, "top_k"),
        ({"teacher": teacher, "dtype": "float32"}, "dtype"),
    ):
        with pytest.raises(ValueError, match=f"Expected argument `path` to be a cache of this teacher.*`{named}` is"):
            losses(**change)


def test_a_cache_of_another_precision_is_refused_and_both_are_named(tmp_path: Path) -> None:
    cache = lambda: TeacherCache(tmp_path / "cache", top_k=None, dtype="float32")  # noqa: E731
    fit("classification", tmp_path, cache(), precision="bf16-mixed", max_epochs=1)
    again = cache()
    fit("classification", tmp_path, again, precision="bf16-mixed", max_epochs=1)
    assert again.misses == 0
    refused = cache()
    with pytest.raises(ValueError, match=r"Expected argument `path`.*`precision` is bfloat16 and not float32"):
        fit("classification", tmp_path, refused, max_epochs=1)
    assert refused.hits == refused.misses == 0

    # A precision of the teacher's own keeps that of the Trainer out.
    own, student = pair("classification")
    for precision in ("32-true", "bf16-mixed"):
        module = DistillationModule(own, student, soft(), teacher_precision="32")
        filled = TeacherCache(tmp_path / "own", top_k=None, dtype="float32")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        run = L.Trainer(max_epochs=1, precision=precision, callbacks=[filled], enable_checkpointing=False, **quiet)  # type: ignore[arg-type]
        run.fit(module, datamodule=Shuffled("classification"))
        assert (filled.misses == 0) == (precision == "bf16-mixed")


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"on a disk with room for the cache, about 0\.00 GB, but got 0\.00 GB free"):
        fit("causal_lm", tmp_path, TeacherCache(tmp_path / "cache"), num_sanity_val_steps=0)


def test_what_it_cannot_keep_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for made, settings, message in (
        (lambda: [AttentionMap("last")], {}, "`attention_map`, which reads what `TeacherCache` does not keep"),
        (lambda: [HiddenState()], {}, "`signals` to hold 'hidden_states' for the objective `hidden_state`"),
        (lambda: [SoftTarget(2.0, "reverse_kl")], {}, "`top_k` to be None for the objective `soft_target`, but got 64"),
        (lambda: [SoftTarget(lambda progress: 2.0 + progress)], {}, "`top_k` to be None .* that does not change can"),
    ):
        module = DistillationModule(*pair("classification"), made())
        with pytest.raises(ValueError, match=message):
            TeacherCache(tmp_path / "cache", **settings).attach(module)
    short: dict[str, Any] = {"prompt_length": 4, "max_new_tokens": 4}
    with pytest.raises(ValueError, match=r"rows that come again, but got `on_policy` 0\.5"):
        TeacherCache(tmp_path / "cache").attach(OnPolicyDistillation(llama(), llama(), on_policy=0.5, **short))
    TeacherCache(tmp_path / "cache").attach(OnPolicyDistillation(llama(), llama(), on_policy=0.0, **short))
    with pytest.raises(TypeError, match="to be used with a `DistillationModule` that has a teacher"):
        TeacherCache(tmp_path / "cache").attach(DistillationModule(None, pair("classification")[1]))


def test_a_store_keeps_rows_of_different_lengths(tmp_path: Path) -> None:
    store = SignalStore(tmp_path, {}, {"a": ("float16", (2,)), "b": ("int32", ())})
    rows = {
        bytes([i] * 16): {"a": torch.randn(i, 2).half().numpy(), "b": torch.arange(2 * i).numpy()} for i in range(4)
    }
    for key, arrays in rows.items():
        store.write(key, arrays)
    store.close()
    again = SignalStore(tmp_path, {}, {"a": ("float16", (2,)), "b": ("int32", ())}, rank=1)
    order = [bytes([i] * 16) for i in (3, 0, 1)]
    read = again.read(order)
    assert torch.equal(read["a"], torch.cat([torch.from_numpy(rows[key]["a"]) for key in order]))
    assert read["b"].tolist() == [*range(6), *range(2)]
    assert bytes([9] * 16) not in again
    # Only what writes has files of its own.
    assert not list(tmp_path.glob("1-*"))


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).resolve().parents[2] / "docs" / "teacher-cache.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", guide, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "teacher-cache.md", "exec"), names)
    assert names["cache"].misses == 0


def cache_flags(folder: Path) -> list[str]:
    """Flags of ``lightning-distill cache`` for 24 rows of text and a teacher, which are written to the folder."""
    table = [("great film", 1), ("dull film", 0), ("a great idea", 1), ("a dull idea", 0)] * 6
    file = folder / "train.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{text} {i}\t{label}\n" for i, (text, label) in enumerate(table)))
    tokenizer = train_tokenizer([f"{text} {i}" for i, (text, _) in enumerate(table)], vocab_size=60)
    bert(vocab_size=len(tokenizer), layers=3).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    flags = ["cache", "--teacher", str(folder / "teacher"), "--cache.path", str(folder / "cache")]
    flags += ["--data", "lightning_distill.data.TextClassificationData", "--data.train_file", str(file)]
    return [*flags, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--cache.path", "train.tsv", "is no folder"),
        ("--cache.path", "teacher", "holds other files"),
        ("--teacher", "nobody", "`--teacher` to be a folder or hub id"),
        ("--data.train_file", "nothing.tsv", "nothing.tsv: there is no such file"),
        ("--cache.dtype", "int8", "--cache.dtype: expected one of 'float16', 'float32', but got 'int8'"),
        ("--trainer.limit_val_batches", "0", "`--trainer.limit_val_batches` to let rows be asked for"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    flag: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = value if value[0].isdigit() or value == "int8" else str(tmp_path / value)
    flags = [*cache_flags(tmp_path), flag, value]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.startswith("lightning-distill cache: error: ")
    assert told.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def train_from(folder: Path, **settings: Any) -> TeacherCache:
    """An epoch of a student from a cache that the command filled."""
    data = TextClassificationData(train_file=folder / "train.tsv", tokenizer=folder / "teacher")
    config = text_parser(None, output_dir=str(folder)).parse_args(["--teacher_cache.path", str(folder / "cache")])
    (cache,) = build_callbacks(config, "student")
    assert isinstance(cache, TeacherCache)
    data.setup("fit")
    student = bert(vocab_size=len(data.tokenizer))  # type: ignore[arg-type]
    module = DistillationModule(TeacherCache.teacher(folder / "cache"), student, tokenizer=data.tokenizer)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", enable_checkpointing=False, callbacks=[cache], **quiet, **settings
    )
    trainer.fit(module, data)
    return cache


def test_the_command_fills_a_cache_and_a_recipe_asks_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = cache_flags(tmp_path)
    main(flags)
    assert "process 0: 24 rows written, 0 were there" in capsys.readouterr().out
    main(flags)
    assert "process 0: 0 rows written, 24 were there" in capsys.readouterr().out
    assert train_from(tmp_path).misses == 0


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_the_command_on_two_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main([*cache_flags(tmp_path), "--trainer.devices", "2", "--trainer.strategy", "ddp_fork"])
    told = dict(re.findall(r"process (\d): (\d+) rows written, 0 were there", capfd.readouterr().out))
    assert told.keys() == {"0", "1"}
    assert all(int(rows) > 8 for rows in told.values())
    # Each has written a part, and either part is complete: one process trains on both without a teacher.
    assert train_from(tmp_path).misses == 0
    train_from(tmp_path, devices=2, strategy="ddp_fork")
