"""LRFinder: what it finds, that it leaves no trace, and that the learning rate holds."""

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MeanMetric

from lightning_distill.callbacks import GradientClipping, LRFinder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists and is not empty"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(L.LightningModule):
    """Two groups of parameters at a ratio of 1 to 10, dropout, batch norm, a metric, a list that grows."""

    def __init__(self, schedule: Callable[..., Any] | None = None, interval: str = "step", attribute: bool = False):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 1)
        self.metric = MeanMetric(nan_strategy="ignore")
        self.seen: list[float] = []
        self.rates: list[list[float]] = []
        self.schedule, self.interval = schedule, interval
        if attribute:
            self.lr = 1e-3
        self.base = 1e-3

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.head(self.body(batch[0])).squeeze(1), batch[1])
        self.metric.update(loss.detach())
        self.seen.append(loss.item())
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        self.log("train_loss", loss)
        random.random()
        np.random.rand()  # noqa: NPY002
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = nn.functional.mse_loss(self.head(self.body(batch[0])).squeeze(1), batch[1])
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        base = getattr(self, "lr", self.base)
        groups = [{"params": self.body.parameters(), "lr": base / 10}, {"params": self.head.parameters(), "lr": base}]
        optimizer = torch.optim.AdamW(groups)
        if self.schedule is None:
            return optimizer
        config = {"scheduler": self.schedule(optimizer, base), "interval": self.interval, "monitor": "train_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def loader(shuffle: bool = True, **kwargs: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(512, 8, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1).sign()), batch_size=64, shuffle=shuffle, **kwargs)


def trainer_of(folder: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    defaults = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    return L.Trainer(**(defaults | kwargs), callbacks=list(callbacks), default_root_dir=folder)


def bits(value: Any) -> Any:
    """Plain, comparable form of nested state."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value


class Witness(L.Callback):
    """Notes the whole state right before and right after the finder; list it on both sides of it."""

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        numpy_state = np.random.get_state()  # noqa: NPY002
        note = {
            "weights": pl_module.state_dict(),
            "metric": [pl_module.metric.mean_value, pl_module.metric.weight, pl_module.metric._update_count],
            "module": [list(pl_module.seen), list(pl_module.rates), [m.training for m in pl_module.modules()]],
            "grads": [p.grad is None for p in pl_module.parameters()],
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedules": [
                {k: v for k, v in c.scheduler.state_dict().items() if k != "lr_lambdas"}
                for c in trainer.lr_scheduler_configs
            ],
            "rng": [torch.get_rng_state(), random.getstate(), numpy_state[1].tobytes(), numpy_state[2:]],
            "loops": trainer.fit_loop.state_dict(),
            "plugin": trainer.precision_plugin.state_dict(),
            "callbacks": [c.state_dict() for c in trainer.callbacks if isinstance(c, GradientClipping)],
            "trainer": [trainer.global_step, trainer.current_epoch, trainer.should_stop, trainer.limit_val_batches],
            "metrics": dict(trainer.callback_metrics),
            "identity": [id(trainer.fit_loop), id(trainer.fit_loop._data_fetcher.iterator), *map(id, trainer.loggers)],
        }
        if (generator := trainer.train_dataloader.generator) is not None:
            note["generator"] = generator.get_state()
        self.notes.append(bits(note))


def run(folder: Path, *callbacks: L.Callback, module: Net | None = None, data: Any = None, **kwargs: Any) -> Any:
    L.seed_everything(3)
    module = Net() if module is None else module
    trainer = trainer_of(folder, *callbacks, **kwargs)
    own = isinstance(module, Distributed)
    trainer.fit(module, None if own else loader() if data is None else data, loader(shuffle=False))
    return trainer, module


# A curve that never falls keeps the configured learning rate: then the whole run has to be the run without a finder.
NEVER_FALLS: dict[str, Any] = {"min_lr": 1e-12, "max_lr": 1e-11}
UNTRACED = {
    "plain": {},
    "disk": {"finder": {"snapshot": "disk"}},
    "accumulation": {"trainer": {"accumulate_grad_batches": 3}},
    "bf16": {"trainer": {"precision": "bf16-mixed"}},
    "fp16": {"scaler": True},
    "validation": {"finder": {"monitor": "val_loss"}, "trainer": {"limit_val_batches": 2}},
    "generator": {"loader": {"generator": 7}},
    "workers": {"loader": {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}},
    "onecycle": {"schedule": lambda optimizer, base: lr_scheduler.OneCycleLR(optimizer, base, total_steps=16)},
}


@pytest.mark.parametrize("case", UNTRACED)
def test_it_leaves_no_trace(tmp_path: Path, case: str) -> None:
    spec: dict[str, Any] = UNTRACED[case]

    def arguments() -> dict[str, Any]:
        kwargs = dict(spec.get("loader", {}))
        if "generator" in kwargs:
            kwargs["generator"] = torch.Generator().manual_seed(7)
        plugins = (
            {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))} if "scaler" in spec else {}
        )
        return plugins | {"data": loader(**kwargs), "module": Net(spec.get("schedule"))} | spec.get("trainer", {})

    clipping, witness = GradientClipping("percentile"), Witness()
    finder = LRFinder(num_steps=32, divergence=None, **NEVER_FALLS, **spec.get("finder", {}))
    with pytest.warns(UserWarning, match="LRFinder keeps the configured learning rate"):
        _, module = run(tmp_path / "with", clipping, witness, finder, witness, **arguments())
    _, expected = run(tmp_path / "without", GradientClipping("percentile"), **arguments())

    report = json.loads((tmp_path / "with" / "lr_finder.json").read_text())
    assert len(report["losses"]) == 32
    assert report["snapshot"] == ("disk" if case == "disk" else "memory")
    before, after = witness.notes
    assert set(before) == set(after)
    for name in before:
        assert before[name] == after[name], name
    assert module.seen == expected.seen
    assert module.rates == expected.rates
    assert bits(module.state_dict()) == bits(expected.state_dict())
    assert sorted(path.name for path in (tmp_path / "with").iterdir()) == ["lr_finder.json", "lr_finder.png"]


SCHEDULES: dict[str, tuple[Callable[..., Any] | None, str]] = {
    "none": (None, "step"),
    "lambda": (lambda o, lr: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 8)), "step"),
    "onecycle": (lambda o, lr: lr_scheduler.OneCycleLR(o, [lr / 10, lr], total_steps=16), "step"),
    "cosine": (lambda o, lr: lr_scheduler.CosineAnnealingLR(o, 16), "step"),
    "restarts": (lambda o, lr: lr_scheduler.CosineAnnealingWarmRestarts(o, 5), "step"),
    "cyclic": (
        lambda o, lr: lr_scheduler.CyclicLR(o, [lr / 100, lr / 10], [lr / 10, lr], 4, cycle_momentum=False),
        "step",
    ),
    "steps": (lambda o, lr: lr_scheduler.StepLR(o, 1, 0.3), "epoch"),
    "plateau": (lambda o, lr: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=0, threshold=0.9), "epoch"),
    "sequential": (
        lambda o, lr: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 12)], milestones=[4]
        ),
        "step",
    ),
}


@pytest.mark.parametrize("attribute", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_holds_under_every_schedule(tmp_path: Path, name: str, attribute: bool) -> None:
    finder = LRFinder("steepest", num_steps=64, smoothing=0.8, min_lr=1.3e-6)
    _, found = run(tmp_path, finder, module=Net(*SCHEDULES[name], attribute=attribute))
    assert finder.lr is not None
    assert finder.lr != pytest.approx(1e-3)
    direct = Net(*SCHEDULES[name])
    # Without an attribute the number is that of the first group, a tenth of the second one's.
    direct.base = finder.lr if attribute else 10 * finder.lr
    _, expected = run(tmp_path, module=direct)
    # A run configured with the number from the start: the same learning rate of both groups at every step.
    np.testing.assert_allclose(found.rates, expected.rates, rtol=1e-9)
    np.testing.assert_allclose([body / head for body, head in found.rates], 0.1, rtol=1e-9)
    if attribute:
        assert found.lr == finder.lr
        assert bits(found.state_dict()) == bits(expected.state_dict())


@pytest.mark.parametrize("name", ["lambda", "onecycle", "plateau", "sequential"])
def test_never_on_resume_and_the_learning_rate_stays(tmp_path: Path, name: str) -> None:
    whole = LRFinder("steepest", num_steps=64, smoothing=0.8, min_lr=1.3e-6)
    _, expected = run(tmp_path / "a", whole, module=Net(*SCHEDULES[name]), data=loader(shuffle=False))
    finder = LRFinder("steepest", num_steps=64, smoothing=0.8, min_lr=1.3e-6)
    stopped, first = run(
        tmp_path / "b", finder, module=Net(*SCHEDULES[name]), data=loader(shuffle=False), limit_train_batches=8,
        max_epochs=1,
    )  # fmt: skip
    stopped.save_checkpoint(tmp_path / "b.ckpt")
    again = LRFinder("steepest", num_steps=64, smoothing=0.8, min_lr=1.3e-6)
    resumed = Net(*SCHEDULES[name])
    trainer_of(tmp_path / "c", again).fit(resumed, loader(shuffle=False), ckpt_path=tmp_path / "b.ckpt")
    assert not (tmp_path / "c" / "lr_finder.json").exists()
    assert again.lr == finder.lr == whole.lr
    assert first.rates + resumed.rates == expected.rates


def test_it_finds_a_learning_rate_that_trains(tmp_path: Path) -> None:
    finder = LRFinder(num_steps=100, recommended_range=(1e-3, 1e-1))
    _, module = run(tmp_path, finder, module=Net(attribute=True), max_epochs=10)
    _, configured = run(tmp_path, module=Net(attribute=True), max_epochs=10)
    assert 1e-3 < finder.lr < 1.0
    assert np.mean(module.seen[-8:]) < 0.7 * np.mean(configured.seen[-8:])
    report = json.loads((tmp_path / "lr_finder.json").read_text())
    assert report["lr"] == finder.lr == report["suggestions"]["valley"]
    assert report["configured_lr"] == pytest.approx(1e-3)
    assert set(report["suggestions"]) == {"valley", "steepest", "slide", "minimum"}
    assert (tmp_path / "lr_finder.png").read_bytes()[:4] == b"\x89PNG"


def test_bounds_are_both_visited_and_linear_is_linear(tmp_path: Path) -> None:
    finder = LRFinder("minimum", num_steps=40, mode="linear", min_lr=1e-4, max_lr=2e-2, divergence=None)
    run(tmp_path, finder)
    lrs = json.loads((tmp_path / "lr_finder.json").read_text())["lrs"]
    assert (lrs[0], lrs[-1]) == pytest.approx((1e-4, 2e-2))
    np.testing.assert_allclose(np.diff(lrs), (2e-2 - 1e-4) / 39)


def test_the_loss_of_accumulated_batches_is_their_mean(tmp_path: Path) -> None:
    arguments = {"num_steps": 32, "min_lr": 1e-12, "max_lr": 1e-11, "divergence": None}
    losses = []
    for size, batches in ((8, 2), (16, 1)):
        module = Net()
        module.body = nn.Linear(8, 16)
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
        data = DataLoader(TensorDataset(x, x.sum(1).sign()), batch_size=size)
        with pytest.warns(UserWarning, match="keeps the configured"):
            run(tmp_path, LRFinder(**arguments), module=module, data=data, accumulate_grad_batches=batches)
        losses.append(json.loads((tmp_path / "lr_finder.json").read_text())["losses"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__(SCHEDULES["lambda"][0])
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()
        return {"loss": loss}


@pytest.mark.filterwarnings("ignore:The lr scheduler dict contains the key")
def test_manual_optimization(tmp_path: Path) -> None:
    finder = LRFinder("steepest", num_steps=64, smoothing=0.8, min_lr=1.3e-6)
    _, module = run(tmp_path, finder, module=Manual())
    np.testing.assert_allclose(
        [body for body, _ in module.rates], [finder.lr * min(1.0, (step + 1) / 8) for step in range(16)]
    )


class Explodes(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (math.nan if self.trainer.max_epochs == 2 else 1.0)


def test_nan_from_the_start_keeps_the_configured_learning_rate(tmp_path: Path) -> None:
    finder = LRFinder()
    with pytest.warns(UserWarning, match=r"learning rate 0.0001. Expected a finite loss at the start"):
        _, module = run(tmp_path, finder, module=Explodes())
    assert finder.lr is None
    assert module.rates[0] == pytest.approx([1e-4, 1e-3])
    report = json.loads((tmp_path / "lr_finder.json").read_text())
    assert report["losses"] == [None]
    assert "NaN in the data or the weights" in report["problem"]
    assert (tmp_path / "lr_finder.png").stat().st_size > 1000


def test_an_error_in_the_sweep_leaves_no_trace_either(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if len(self.seen) == 5:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    module = Fails()
    before = bits(module.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, LRFinder(snapshot="disk"), module=module)
    assert bits(module.state_dict()) == before
    assert module.seen == []
    assert list(tmp_path.iterdir()) == []


NORMS: list[float] = []


class Noted(GradientClipping):
    """Notes, outside of what the finder puts back, the norm of the clipped gradient of every step."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        NORMS.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())


@pytest.mark.parametrize("kept", [("GradientClipping",), ()])
def test_clipping_stays_active_in_the_sweep_unless_told_otherwise(tmp_path: Path, kept: tuple[str, ...]) -> None:
    NORMS.clear()
    finder = LRFinder(num_steps=64, smoothing=0.8, keep_callbacks=kept, divergence=None, max_lr=0.1)
    run(tmp_path, finder, Noted("norm", 1e-3))
    assert len(NORMS) == 16 + (64 if kept else 0)
    assert max(NORMS) == pytest.approx(1e-3, rel=1e-2)


def test_nothing_of_the_sweep_reaches_the_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    run(tmp_path, LRFinder(num_steps=64, smoothing=0.8), logger=logger, log_every_n_steps=1)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert [int(line.split(",")[1]) for line in lines[1:]] == list(range(16))


def test_a_learning_rate_far_from_the_recommended_range_is_worth_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="outside the recommended range from 1e-08 to 1e-07"):
        run(tmp_path, LRFinder(recommended_range=(1e-8, 1e-7), min_lr=1e-5))


class Distributed(Net):
    def __init__(self, out: Path) -> None:
        super().__init__(attribute=True)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.out = out

    def train_dataloader(self) -> DataLoader:
        # Rank r of 2 sees the samples r, r + 2, ...: together the batches that one process sees.
        x = torch.randn(256, 8, generator=torch.Generator().manual_seed(5))
        data = TensorDataset(x, x.sum(1).sign())
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=32 // self.trainer.world_size, sampler=sampler)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.body, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.head, mesh=self.device_mesh["data_parallel"])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in self.parameters())

    def on_train_end(self) -> None:
        torch.save([self.lr, self.rates[-1]], self.out / f"{self.trainer.global_rank}.pt")


@pytest.mark.parametrize("strategy", [pytest.param("ddp_fork", marks=pytest.mark.forks), "fsdp2"])
def test_two_processes_agree_with_one(tmp_path: Path, strategy: str) -> None:
    finder = LRFinder("steepest", num_steps=64, smoothing=0.8, min_lr=1.3e-6)
    if strategy == "fsdp2":
        # A process group of one: the sharded code path without a second process.
        plugin: Any = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
        run(tmp_path, finder, module=Distributed(tmp_path), strategy=plugin)
        torch.distributed.destroy_process_group()
    else:
        run(tmp_path, finder, module=Distributed(tmp_path), strategy=strategy, devices=2)
    ranks = range(1 if strategy == "fsdp2" else 2)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in ranks]
    two = json.loads((tmp_path / "lr_finder.json").read_text())
    assert all(lr == two["lr"] and rates == pytest.approx([lr / 10, lr]) for lr, rates in saved)

    run(tmp_path / "one", finder, module=Distributed(tmp_path))
    one = json.loads((tmp_path / "one" / "lr_finder.json").read_text())
    np.testing.assert_allclose(two["losses"][:40], one["losses"][:40], rtol=1e-4)
    assert two["lr"] == pytest.approx(one["lr"])


def test_bad_names_are_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`attribute` to name a positive number.*but got 'rate'"):
        run(tmp_path, LRFinder(attribute="rate"))
    with pytest.raises(ValueError, match=r"`monitor` to name a logged metric, but got 'accuracy'; there are.*val_loss"):
        run(tmp_path, LRFinder(monitor="accuracy"), limit_val_batches=1)
