import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_distill.data.sampler import BucketBatchSampler, ResumableDataLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork.*"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

LENGTHS = [3 + (7 * i) % 23 for i in range(61)]


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 400),
    batch=st.integers(1, 16),
    replicas=st.integers(1, 5),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 5),
)
def test_ranks_share_the_batches_of_one_process(n: int, batch: int, replicas: int, seed: int, epoch: int) -> None:
    lengths = np.random.default_rng(n).integers(1, 50, n).tolist()
    ranks = [BucketBatchSampler(lengths, batch, seed=seed, num_replicas=replicas, rank=r) for r in range(replicas)]
    one = BucketBatchSampler(lengths, batch * replicas, seed=seed)
    for sampler in [*ranks, one]:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in ranks]
    assert {len(b) for b in batches} == {len(s) for s in ranks} == {len(one)}
    seen = [index for rank in batches for b in rank for index in b]
    assert set(seen) == set(range(n))
    assert len(seen) - n == -n % replicas
    for step, whole in enumerate(one):
        together = [index for rank in batches for index in rank[step]]
        assert sorted(together)[: len(whole)] == sorted(whole) or set(whole) <= set(together)
        assert max(len(rank[step]) for rank in batches) <= batch


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 200), batch=st.integers(1, 16), replicas=st.integers(1, 5))
def test_evaluation_gives_each_sample_once(n: int, batch: int, replicas: int) -> None:
    lengths = np.random.default_rng(n).integers(1, 50, n).tolist()
    ranks = [BucketBatchSampler(lengths, batch, shuffle=False, num_replicas=replicas, rank=r) for r in range(replicas)]
    batches = [list(sampler) for sampler in ranks]
    assert sorted(index for rank in batches for b in rank for index in b) == list(range(n))
    assert all(0 < len(b) <= batch for rank in batches for b in rank)
    assert [len(s) for s in ranks] == [len(b) for b in batches]
    assert len({len(b) for b in batches}) == 1 or batch == 1 or n < replicas


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BucketBatchSampler(LENGTHS, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert order(2, 1) == order(2, 1)
    assert len({str(o) for o in orders}) == 9  # (0, 1) and (1, 0) differ too, unlike in DistributedSampler


def test_bucketing_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 120, 5000)
    padded = sum(lengths[b].max() * len(b) for b in BucketBatchSampler(lengths.tolist(), 32))
    shuffled = sum(b.max() * len(b) for b in np.array_split(np.random.default_rng(1).permutation(lengths), 157))
    assert padded < 1.05 * lengths.sum() < 1.7 * lengths.sum() < shuffled


def test_drop_last() -> None:
    sampler = BucketBatchSampler(LENGTHS, 4, drop_last=True, num_replicas=2, rank=0)
    assert [len(b) for b in sampler] == [4] * (61 // 8) == [4] * len(sampler)


@pytest.mark.parametrize(("lengths", "batch_size", "match"), [([], 2, "`lengths`"), ([1], 0, "`batch_size`")])
def test_bad_arguments(lengths: list[int], batch_size: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BucketBatchSampler(lengths, batch_size)
    with pytest.raises(ValueError, match="rank"):
        BucketBatchSampler([1, 2], 1, num_replicas=2, rank=2)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 7, 16])
def test_loader_goes_on_where_it_stopped(num_workers: int, stop: int) -> None:
    def loader() -> ResumableDataLoader:
        return ResumableDataLoader(range(61), BucketBatchSampler(LENGTHS, 4, seed=3), num_workers=num_workers)

    first = loader()
    first.sampler.set_epoch(2)
    whole = [batch.tolist() for batch in first]
    iterator = iter(first)
    for _ in range(stop):
        next(iterator)
    state = first.state_dict() if stop else {"epoch": 2, "position": 0, "global_batch_size": 4}
    second = loader()
    second.load_state_dict(state)
    second.sampler.set_epoch(2)
    assert [batch.tolist() for batch in second] == whole[stop:]
    assert [batch.tolist() for batch in second] == whole  # the next pass is a whole one
    second.load_state_dict(state)
    second.sampler.set_epoch(3)
    assert len(list(second)) == len(whole) == len(second)


def test_loader_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(ResumableDataLoader(range(61), BucketBatchSampler(LENGTHS, 4)))
    assert torch.equal(before, torch.get_rng_state())


def test_resume_with_another_number_of_processes() -> None:
    one = BucketBatchSampler(LENGTHS, 8)
    batches = list(one)
    state = {"epoch": 0, "position": 3, "global_batch_size": 8}
    two = [BucketBatchSampler(LENGTHS, 4, num_replicas=2, rank=r) for r in range(2)]
    for sampler in two:
        sampler.load_state_dict(state)
    rest = [sorted(a + b) for a, b in zip(*two, strict=True)]
    assert rest[:-1] == [sorted(b) for b in batches[3:-1]]
    other = BucketBatchSampler(LENGTHS, 16)
    with pytest.warns(UserWarning, match="8 samples in a step"):
        other.load_state_dict(state)
    assert other.state_dict()["position"] == 1


class Recorder(L.LightningModule):
    """A model that remembers its batches."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.tolist())
        return self.layer(batch[:, None].float() / 61).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.seen.append([-1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> ResumableDataLoader:
        return ResumableDataLoader(range(61), BucketBatchSampler(LENGTHS, 4, seed=1), num_workers=self.num_workers)

    def val_dataloader(self) -> ResumableDataLoader:
        return ResumableDataLoader(range(61), BucketBatchSampler(LENGTHS, 32, shuffle=False))


def make_trainer(folder: Path, **kwargs: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
    }
    return L.Trainer(**{**defaults, **kwargs})


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("limit", "check_val"), [(1.0, 1.0), (9, 4)])
def test_lightning_resumes_at_every_step(tmp_path: Path, num_workers: int, limit: float, check_val: float) -> None:
    steps = 16 if limit == 1.0 else 9
    options = {"limit_train_batches": limit, "val_check_interval": check_val}
    whole = Recorder()
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(tmp_path, callbacks=[checkpoints], enable_checkpointing=True, **options)
    trainer.fit(whole, datamodule=Data(num_workers))
    batches = [b for b in whole.seen if b != [-1]]
    assert len(batches) == 3 * steps
    stops = range(1, 3 * steps) if num_workers == 0 else (1, steps - 1, steps, steps + 5, 2 * steps)
    for stop in stops:
        resumed = Recorder()
        make_trainer(tmp_path, **options).fit(
            resumed, datamodule=Data(num_workers), ckpt_path=tmp_path / f"step={stop}.ckpt"
        )
        assert [b for b in resumed.seen if b != [-1]] == batches[stop:], stop
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.parametrize("moment", ["epoch", "validation"])
def test_lightning_resumes_from_the_end_of_an_epoch(tmp_path: Path, moment: str) -> None:
    whole = Recorder()
    checkpoints = ModelCheckpoint(
        tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=moment == "epoch"
    )
    make_trainer(tmp_path, callbacks=[checkpoints], enable_checkpointing=True).fit(whole, datamodule=Data(2))
    batches = [b for b in whole.seen if b != [-1]]
    for epoch in (0, 1):
        resumed = Recorder()
        make_trainer(tmp_path).fit(resumed, datamodule=Data(2), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert [b for b in resumed.seen if b != [-1]] == batches[16 * (epoch + 1) :]
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


class Dump(Callback):
    """Writes what this process saw, for the parent of the fork to read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.set_num_threads(1)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(pl_module.seen, self.folder / f"rank{trainer.global_rank}.pt")


class Eval(Recorder):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.seen.append([-1, *batch.tolist()])


@pytest.mark.forks
def test_two_processes_see_each_sample_once(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    trainer = make_trainer(tmp_path, strategy="ddp_fork", devices=2, max_epochs=2, callbacks=[Dump(tmp_path)])
    trainer.fit(Eval(), datamodule=Data())
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    single = BucketBatchSampler(LENGTHS, 8, seed=1)
    for epoch in range(2):
        train = [[b for b in seen if b[0] != -1][8 * epoch : 8 * epoch + 8] for seen in ranks]
        together = [index for rank in train for b in rank for index in b]
        assert len(together) == 62
        assert set(together) == set(range(61))
        single.set_epoch(epoch)
        for step, batch in enumerate(single):
            assert set(batch) <= set(train[0][step]) | set(train[1][step])
    evaluated = [index for seen in ranks for b in seen if b[0] == -1 for index in b[1:]]
    assert sorted(evaluated) == sorted([*range(61), *range(61)])


def test_two_processes_draw_equal_classes_as_one_does_and_resume() -> None:
    lengths, classes = list(range(1, 21)), [0] * 17 + [1] * 3
    one = list(BucketBatchSampler(lengths, 4, classes=classes, seed=3, num_replicas=1, rank=0))
    ranks = [list(BucketBatchSampler(lengths, 2, classes=classes, seed=3, num_replicas=2, rank=r)) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in one]
    assert sum(index >= 17 for batch in one for index in batch) == 10
    sampler = BucketBatchSampler(lengths, 4, classes=classes, seed=3)
    iterator = iter(sampler)
    next(iterator), next(iterator)
    resumed = BucketBatchSampler(lengths, 4, classes=classes, seed=3)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == one[2:]
    with pytest.raises(ValueError, match="`classes` to have one class per sample, 20, but got 2"):
        BucketBatchSampler(lengths, 4, classes=[0, 1])
