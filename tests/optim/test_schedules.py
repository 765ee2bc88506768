"""Schedules: what they do over a run, with lengths from the Trainer; recommended learning rates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SchedulerType

from lightning_distill.callbacks import ScheduleFree
from lightning_distill.optim import LRRange, build_lr_scheduler, build_optimizer, recommended_lr
from tests.callbacks.registry import Regression, same, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Scheduled(Regression):
    def __init__(self, **schedule: Any) -> None:
        super().__init__()
        self.schedule, self.rates = schedule, []

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, "sgd", lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": build_lr_scheduler(self, optimizer, **self.schedule)}

    def on_train_batch_start(self, *_: Any) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


def rates(folder: Path, schedule: dict[str, Any], **settings: Any) -> list[float]:
    module = Scheduled(**schedule)
    trainer(folder, **{"max_steps": 10, "limit_train_batches": 5, **settings}).fit(module)
    return module.rates


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ({"name": "linear"}, [0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01]),
        ({"name": "linear", "warmup": 0.2}, [0, 0.05, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125]),
        ({"name": "linear", "warmup": 2}, [0, 0.05, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125]),
        ({"name": "step", "options": {"step_size": 4}}, [0.1] * 4 + [0.01] * 4 + [0.001] * 2),
        ({"name": "step", "interval": "epoch", "options": {"step_size": 1}}, [0.1] * 5 + [0.01] * 5),
        ({"name": "wsd", "warmup": 1}, [0] + [0.1] * 8 + [0.05]),
        ({"name": "constant"}, [0.1] * 10),
        ({"name": "ExponentialLR", "options": {"gamma": 0.5}}, [0.1 * 0.5**i for i in range(10)]),
        ({"name": "MultiStepLR", "options": {"milestones": [3, 6]}}, [0.1] * 3 + [0.01] * 3 + [0.001] * 4),
    ],
    ids=str,
)
def test_rates_over_a_run(schedule: dict[str, Any], wanted: list[float], tmp_path: Path) -> None:
    assert rates(tmp_path, schedule) == pytest.approx(wanted)


def test_the_length_counts_optimizer_steps_not_batches(tmp_path: Path) -> None:
    got = rates(
        tmp_path, {"name": "linear"}, max_steps=-1, max_epochs=2, limit_train_batches=4, accumulate_grad_batches=2
    )
    assert got[::2] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_cosine_ends_at_its_minimum(tmp_path: Path) -> None:
    module = Scheduled(name="cosine", min_lr_ratio=0.1)
    trainer(tmp_path, max_steps=10).fit(module)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_one_cycle_peaks_at_the_learning_rate_and_cyclic_swings_up_to_it(tmp_path: Path) -> None:
    one_cycle = rates(tmp_path, {"name": "one_cycle", "warmup": 0.4})
    assert max(one_cycle) == pytest.approx(0.1)
    assert one_cycle.index(max(one_cycle)) == 3
    cyclic = rates(tmp_path / "cyclic", {"name": "cyclic", "options": {"step_size_up": 3}})
    assert cyclic[:7] == pytest.approx([0.01, 0.04, 0.07, 0.1, 0.07, 0.04, 0.01])


def test_a_plateau_lowers_the_rate_with_its_metric(tmp_path: Path) -> None:
    options = {"patience": 0, "threshold": 1e9, "threshold_mode": "abs"}
    schedule = {"name": "reduce_on_plateau", "interval": "epoch", "monitor": "val_loss", "options": options}
    assert rates(tmp_path, schedule, max_steps=-1, max_epochs=3, limit_train_batches=1) == pytest.approx(
        [0.1, 0.1, 0.01]
    )


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_name_of_transformers_is_built(name: str) -> None:
    module = Regression()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    options: dict[str, Any] = {"min_lr_rate": 0.1} if "min_lr" in name else {}
    options |= {"num_decay_steps": 2} if name == "warmup_stable_decay" else {}
    made = build_lr_scheduler(
        module, optimizer, name, num_training_steps=10, warmup=2, monitor="val_loss", options=options
    )
    assert made["interval"] == "step"
    assert made["scheduler"].state_dict()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"name": "zigzag"}, "name"),
        ({"interval": "batch"}, "interval"),
        ({"warmup": -1}, "warmup"),
        ({"warmup": 20}, "warmup"),
        ({"name": "linear", "min_lr_ratio": 0.1}, "min_lr_ratio"),
        ({"name": "reduce_on_plateau"}, "monitor"),
        ({"num_training_steps": None}, "num_training_steps"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], name: str) -> None:
    module = Regression()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    with pytest.raises(ValueError, match=f"Expected argument `{name}`"):
        build_lr_scheduler(module, optimizer, **{"num_training_steps": 10, **arguments})


class Free(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.validated: list[torch.Tensor] = []

    def configure_optimizers(self) -> Any:
        return build_optimizer(self, "schedule_free_adamw", lr=0.05)

    def on_validation_epoch_end(self) -> None:
        self.validated.append(self.head.weight.detach().clone())


def average(module: Free) -> torch.Tensor:
    """The average by its definition, from the training point y and z: y = (1 - beta) z + beta x."""
    optimizer: Any = module.trainer.optimizers[0]
    optimizer.train()
    y, z = module.head.weight.detach(), optimizer.state[module.head.weight]["z"]
    x = (y - 0.1 * z) / 0.9
    optimizer.eval()
    return x


def test_schedule_free_validates_saves_and_ends_with_the_average_and_resumes_exactly(tmp_path: Path) -> None:
    module = Free()
    trainer(tmp_path / "whole", ScheduleFree(), max_steps=6).fit(module)
    torch.testing.assert_close(module.head.weight.detach(), average(module))
    torch.testing.assert_close(module.validated[-1], module.head.weight.detach())
    whole = torch.load(tmp_path / "whole" / "step=6.ckpt", weights_only=True)
    torch.testing.assert_close(whole["state_dict"]["head.weight"], module.head.weight.detach())
    for step in (2, 4):
        folder = tmp_path / str(step)
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
        trainer(folder, ScheduleFree(), max_steps=6).fit(Free(), ckpt_path=checkpoint)
        resumed = torch.load(folder / "step=6.ckpt", weights_only=True)
        assert same(resumed["state_dict"], whole["state_dict"])
        assert same(resumed["optimizer_states"], whole["optimizer_states"])


def test_schedule_free_refuses_other_optimizers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to be schedule-free beside the ScheduleFree callback, but got .*SGD"):
        trainer(tmp_path, ScheduleFree()).fit(Regression())


@pytest.mark.parametrize(
    ("arguments", "low", "high"),
    [
        ({"task": "classification"}, 1e-5, 3e-5),
        ({"task": "token_classification"}, 3e-5, 5e-5),
        ({"task": "generation"}, 5e-5, 1e-4),
        ({"method": "head"}, 1e-4, 5e-4),
        ({"method": "lora"}, 6e-5, 5e-4),
        ({"optimizer": "sgd"}, 1e-3, 1e-2),
        ({"num_examples": 500}, 1e-5, 3e-10**0.5),
        ({"num_examples": 500_000}, 3e-10**0.5, 3e-5),
    ],
)
def test_recommended_rates(arguments: dict[str, Any], low: float, high: float) -> None:
    got = recommended_lr(**arguments)
    assert (got.low, got.high) == pytest.approx((low, high))
    assert got.source


def test_a_rate_far_outside_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="0.1 is more than ten times outside the recommended range"):
        LRRange(1e-5, 5e-5, "common practice").warn_if_far(0.1)
