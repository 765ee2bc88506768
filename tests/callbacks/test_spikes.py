"""GradientClipping: no single step breaks a training, whatever the algorithm; ZClip's options; sparse gradients."""

import math
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillationModule
from lightning_distill.callbacks import GradientClipping
from lightning_distill.functional.clipping import gradient_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
ALGORITHMS = ["norm", "value", "adaptive", "percentile", "zscore"]


def trainer(steps: int, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip


class Given(L.LightningModule):
    """One weight whose gradients are given; it notes how far each step moves it."""

    def __init__(self, gradients: list[float]) -> None:
        super().__init__()
        self.weight, self.gradients, self.moved = nn.Parameter(torch.ones(1)), gradients, []

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.tensor(self.gradients)[:, None]))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        self.before = self.weight.item()
        return (self.weight.double() * batch[0]).sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.moved.append(abs(self.weight.item() - self.before))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1.0)


def moved(gradients: list[float], *args: Any, **options: Any) -> list[float]:
    module = Given(gradients)
    clipping = GradientClipping(*args, warn_norm=None, **options)
    trainer(len(gradients), clipping).fit(module)
    return module.moved


@pytest.mark.parametrize("step", [0, 1, 2, 19, 24, 25, 40])
@pytest.mark.parametrize(("algorithm", "threshold"), [*zip(ALGORITHMS, [None] * 5, strict=True), ("percentile", 95.0)])
def test_one_spike_at_any_step_moves_no_weight_far(algorithm: str, threshold: float | None, step: int) -> None:
    gradients = [1.0 + 0.1 * (-1) ** index for index in range(45)]
    gradients[step] = 1e6
    steps = moved(gradients, algorithm, threshold)
    assert steps[step] < 5
    # Nor does it stop those after it, or let them pass unseen.
    assert all(value > 0 for value in steps)
    assert max(steps) < 5


@pytest.mark.parametrize("algorithm", ["percentile", "zscore"])
def test_the_papers_own_beginning_is_one_argument_away(algorithm: str) -> None:
    gradients = [1.0, 1e3, *[1.0] * 8]
    steps = moved(gradients, algorithm, 50.0 if algorithm == "percentile" else None, spike_factor=None)
    assert steps[0] == pytest.approx(1.0, rel=1e-3)
    assert steps[1] == pytest.approx(1e3 if algorithm == "zscore" else 500.5, rel=1e-3)


def zclip(norms: list[float], *, option: str, factor: float, skip: bool, fixed: float | None) -> list[float]:
    """The norms after the authors' algorithm, on numbers: a warm-up of 5, alpha 0.9, threshold 2."""
    after, mean, variance = [], float(np.mean(norms[:5])), float(np.var(norms[:5]))
    for count, norm in enumerate(norms):
        bound = math.inf
        if count >= 5:
            z = (norm - mean) / (math.sqrt(variance) + 1e-6)
            spike = z > 2
            if spike:
                bound = mean if option == "mean" else factor * (mean + 2 * math.sqrt(variance) / (z / 2))
            if not (spike and skip):
                effective = min(norm, bound)
                mean = 0.9 * mean + 0.1 * effective
                variance = 0.9 * variance + 0.1 * (effective - mean) ** 2
        after.append(min(norm, bound, math.inf if fixed is None else fixed))
    return after


@pytest.mark.parametrize("option", ["adaptive_scaling", "mean"])
@pytest.mark.parametrize("factor", [1.0, 0.6])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("fixed", [None, 1.1])
def test_zclips_options_are_the_authors_arithmetic(option: str, factor: float, skip: bool, fixed: float | None) -> None:
    generator = np.random.default_rng(0)
    norms = (1 + 0.2 * generator.random(30)).tolist()
    norms[9], norms[10], norms[20] = 4.0, 3.0, 9.0
    steps = moved(
        norms, "zscore", 2.0, warmup_steps=5, decay=0.9, clip_option=option, clip_factor=factor,
        skip_update_on_spike=skip, max_grad_norm=fixed, spike_factor=None,
    )  # fmt: skip
    assert steps == pytest.approx(zclip(norms, option=option, factor=factor, skip=skip, fixed=fixed), rel=1e-3)


@pytest.mark.parametrize(
    ("algorithm", "options", "named"),
    [
        ("norm", {"clip_option": "mean"}, "clip_option"),
        ("percentile", {"skip_update_on_spike": True}, "skip_update_on_spike"),
        ("value", {"max_grad_norm": 1.0}, "max_grad_norm"),
        ("zscore", {"clip_factor": 0.0}, "clip_factor"),
        ("zscore", {"spike_factor": -1.0}, "spike_factor"),
        ("zscore", {"clip_option": "median"}, "clip_option"),
    ],
)
def test_options_that_mean_nothing_are_refused(algorithm: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"`.*{named}.*`"):
        GradientClipping(algorithm, **options)


class Bag(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 8, sparse=sparse), nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).mean(1))


@pytest.mark.parametrize("algorithm", [None, *ALGORITHMS])
def test_sparse_gradients_train_as_dense_ones_do(algorithm: str | None) -> None:
    weights, logged = [], []
    generator = torch.Generator().manual_seed(0)
    rows = TensorDataset(torch.randint(50, (64, 5), generator=generator), torch.randint(2, (64,), generator=generator))
    for sparse in (True, False):
        torch.manual_seed(0)
        teacher, student = Bag(False), Bag(sparse)
        module = DistillationModule(teacher, student, optimizer=lambda p: torch.optim.SGD(p, 1.0))
        callbacks = (
            [] if algorithm is None else [GradientClipping(algorithm, 1e-2 if algorithm != "percentile" else 10)]
        )
        run = trainer(8, *callbacks)
        run.fit(module, DataLoader(rows, 8))
        weights.append(student.words.weight.detach())
        logged.append(run.callback_metrics["grad_norm"])
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(logged[0], logged[1])


def test_the_entries_of_a_sparse_gradient_are_its_own_memory() -> None:
    words = nn.Embedding(9, 2, sparse=True)
    words(torch.tensor([3, 3, 5])).sum().backward()
    entries = gradient_of(words.weight)
    assert entries is not None
    entries.mul_(0.5)
    assert words.weight.grad is not None
    assert words.weight.grad.to_dense()[[3, 5]].tolist() == [[1.0, 1.0], [0.5, 0.5]]
