"""Every callback of the library, one row each, and the small run they are all put through."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_distill import DistillationModule
from lightning_distill.callbacks import (
    GPTQ,
    EarlyExit,
    FiniteLoss,
    GradientClipping,
    InitPolicy,
    LossAdvice,
    LRFinder,
    Resumable,
    ScheduleFree,
    TeacherCache,
)


@dataclass(frozen=True)
class Row:
    """A callback, the arguments it is tested with (as YAML would give them), and arguments it must refuse by name."""

    callback: type[L.Callback]
    arguments: dict[str, Any] = field(default_factory=dict)
    bad: tuple[dict[str, Any], ...] = ()
    #: Makes the module of its runs; a word, as the classes are below.
    of: str = "Regression"

    def module(self) -> L.LightningModule:
        made: L.LightningModule = globals()[self.of]()
        return made

    def build(self, folder: Path | None = None, **changes: Any) -> L.Callback:
        """The callback; what it writes goes to a folder of its own, as that of the checkpoints must be empty."""
        own = FOLDER if folder is None else str(folder / FOLDER)
        arguments = {name: own if value == FOLDER else value for name, value in self.arguments.items()}
        return self.callback(**{**arguments, **changes})

    def __str__(self) -> str:
        return "-".join([self.callback.__name__, *(str(v) for v in self.arguments.values() if isinstance(v, str))])


# Stands for a folder that :meth:`Row.build` makes up; part of the tests' names.
FOLDER = "of-the-test"

ROWS = [
    Row(
        GradientClipping,
        {"algorithm": "norm", "threshold": 0.1},
        bad=(
            {"algorithm": "median"},
            {"threshold": 0.0},
            {"per": "layer"},
            {"exclude": "*.bias"},
            {"eps": -1.0},
            {"nonfinite": "ignore"},
            {"decay": 2.0},
            {"patience": 0},
            {"history": -5},
            {"warmup_steps": 0},
            {"warn_norm": -1.0},
            {"reduce_lr": 5.0},
        ),
    ),
    Row(GradientClipping, {"algorithm": "value", "threshold": 0.01}),
    Row(GradientClipping, {"algorithm": "adaptive", "threshold": 0.02}),
    Row(GradientClipping, {"algorithm": "percentile", "threshold": 50.0, "per": "parameter_group", "history": 4}),
    Row(GradientClipping, {"algorithm": "zscore", "threshold": 0.5, "warmup_steps": 2}),
    Row(
        LRFinder,
        {"suggestion": "valley", "num_steps": 150, "min_lr": 1e-2, "max_lr": 1.0, "output_dir": FOLDER},
        bad=(
            {"suggestion": "best"},
            {"min_lr": 0.0},
            {"max_lr": 1e-9},
            {"num_steps": 5},
            {"mode": "cubic"},
            {"val_batches": 0},
            {"smoothing": 1.0},
            {"divergence": 0.5},
            {"recommended_range": (1.0, 0.1)},
            {"keep_callbacks": "EMA"},
            {"snapshot": "cloud"},
        ),
    ),
    Row(
        EarlyExit,
        {"exits": [1], "student": "", "layers": "body", "task": "regression", "training": "alternate", "lr": 0.02},
        bad=(
            {"exits": "some"},
            {"criterion": 0.9},
            {"training": "three_stage"},
            {"ramp": "deep"},
            {"loss_weights": "random"},
            {"teacher_weight": 2.0},
            {"temperature": 0.0},
            {"lr": 0.0},
            {"init": "magic"},
        ),
    ),
    Row(FiniteLoss, {"max_skipped": 2}, bad=({"max_skipped": -1}, {"max_skipped": 0.5}, {"max_skipped": "all"})),
    Row(Resumable, {"seed": 3}, bad=({"seed": -1}, {"seed": 2**32}, {"seed": None}, {"resume_hint": 3})),
    Row(LossAdvice, {"window": 2}, bad=({"window": 0}, {"min_fall": 2.0})),
    Row(
        InitPolicy,
        {"policy": "auto", "output_dir": FOLDER},
        bad=({"policy": "magic"}, {"std": 0.0}, {"only": []}, {"residual": "resnet"}, {"teacher": "somewhere"}),
    ),
    # Asked to gain a lot, so that the float student stays and the weights can be compared.
    Row(
        GPTQ,
        {
            "group_size": 32,
            "attribute": "body",
            "monitor": "val_loss",
            "mode": "min",
            "max_drop": -9.0,
            "folder": FOLDER,
        },
        bad=(
            {"bits": 5},
            {"group_size": 7},
            {"calibration": "test"},
            {"num_samples": 0},
            {"embedding_bits": 3},
            {"mode": "up"},
            {"sensitive_bits": 4},
            {"sensitive_layers": 0},
            {"budget_bytes": 0},
        ),
    ),
    Row(InitPolicy, {"policy": "orthogonal", "only": "all", "seed": 3, "output_dir": FOLDER}),
    Row(
        TeacherCache,
        {"path": FOLDER, "top_k": None, "dtype": "float32"},
        bad=({"signals": "logits"}, {"signals": ["hidden_states"]}, {"top_k": 0}, {"dtype": "int8"}),
        of="Distillation",
    ),
    Row(ScheduleFree, of="Averaged"),
]


class Batches:
    """Eight batches of eight rows in a fixed order, this process's share of each; it stores its position."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(8, 8, 4, generator=generator)[:, rank::world_size]
        self.y = self.x.sum(-1, keepdim=True).sin()
        self.position = 0

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.position < len(self):
            self.position += 1
            yield self.x[self.position - 1], self.y[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.position = state_dict["position"]


class Regression(L.LightningModule):
    """A small network with momentum, weight decay, two parameter groups and a schedule stepped at every step."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
            self.head = nn.Linear(32, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.head(self.body(batch[0])), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.head(self.body(batch[0])), batch[1]), sync_dist=True)

    def train_dataloader(self) -> Batches:
        return Batches(self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> Batches:
        return Batches(self.trainer.global_rank, self.trainer.world_size)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.body.parameters(), "lr": 0.05}, {"params": self.head.parameters(), "lr": 0.1}]
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Averaged(Regression):
    """The same with an optimizer that averages. (SGD: Adam's first steps turn round with the sign of a rounding.)"""

    def configure_optimizers(self) -> Any:
        from schedulefree import SGDScheduleFree

        return SGDScheduleFree(self.parameters(), lr=0.1)


class Distillation(DistillationModule):
    """The network of :class:`Regression` with a teacher of the same kind, on the same data."""

    def __init__(self) -> None:
        teacher, student = Regression(), Regression()
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(1.5)
        teacher, student = (nn.Sequential(model.body, model.head) for model in (teacher, student))
        super().__init__(teacher, student, task="regression")

    train_dataloader = Regression.train_dataloader  # type: ignore[assignment]
    val_dataloader = Regression.val_dataloader  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(folder: Path, *callbacks: L.Callback, **arguments: Any) -> L.Trainer:
    """A quiet Trainer on the CPU: five steps, each of which leaves a checkpoint `step=N.ckpt` in the folder."""
    every_step = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    defaults: dict[str, Any] = {
        "max_steps": 5,
        "limit_train_batches": 3,
        "limit_val_batches": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    return L.Trainer(**{**defaults, "callbacks": [*callbacks, every_step], **arguments})


def same(one: Any, other: Any, rtol: float = 0.0) -> bool:
    """Whether two nested states are equal, NaN equal to NaN; tensors and numbers up to a relative distance."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], rtol) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b, rtol) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=rtol, atol=rtol, equal_nan=True)
    if isinstance(one, float):
        return same(torch.tensor(one), torch.tensor(other), rtol)
    return bool(one == other)
