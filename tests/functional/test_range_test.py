"""Suggestions against fastai's own functions, torch_lr_finder's and Lightning's, on the same curves."""

import ast
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_distill.functional import lr_suggestion, smooth_losses, trim_curve
from lightning_distill.functional.range_test import height_of_fall

# fastai hands torch tensors to numpy functions.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

RULES = {"valley": "valley", "steepest": "steep", "slide": "slide", "minimum": "minimum"}


def noisy_curve(noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Flat at 2.3, falls around 1e-2, explodes above 3e-1."""
    lrs = torch.logspace(-8, 0, 100, dtype=torch.float64)
    losses = 2.3 - 1.5 * torch.sigmoid(4 * (lrs.log10() + 2)) + 20 * lrs**4
    return lrs, losses + noise * torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@functools.cache
def fastai_rules() -> dict[str, Callable[..., Any]]:
    """fastai's four functions, taken from its source file, so that none of its heavy requirements are needed."""
    spec = importlib.util.find_spec("fastai")
    if spec is None:
        pytest.skip("needs the source of fastai: pip install --no-deps fastai")
    source = (Path(spec.submodule_search_locations[0]) / "callback" / "schedule.py").read_text()
    functions = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name in RULES.values() and not node.decorator_list
    ]
    namespace: dict[str, Any] = {"np": np, "to_np": lambda tensor: tensor.numpy()}
    exec(compile(ast.Module(functions, []), "fastai", "exec"), namespace)
    return {rule: namespace[name] for rule, name in RULES.items()}


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), points=st.integers(16, 90), noise=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]))
def test_every_rule_equals_fastai(rule: str, seed: int, points: int, noise: float) -> None:
    lrs, losses = noisy_curve(noise, seed)
    lrs, losses = lrs[-points:], losses[-points:]
    expected, _ = fastai_rules()[rule](lrs, losses, points)
    assert lr_suggestion(lrs, losses, rule) == pytest.approx(expected, rel=1e-12)


def test_steepest_equals_torch_lr_finder() -> None:
    # torch_lr_finder differentiates by the index, which on a log-spaced sweep is the log learning rate up to a factor.
    finder = pytest.importorskip("torch_lr_finder", reason="needs pip install --no-deps torch_lr_finder")
    figure = pytest.importorskip("matplotlib.figure").Figure()
    model = torch.nn.Linear(1, 1)
    theirs = finder.LRFinder(model, torch.optim.SGD(model.parameters(), lr=1e-3), torch.nn.MSELoss())
    lrs, losses = noisy_curve(1e-4)
    theirs.history = {"lr": lrs.tolist(), "loss": losses.tolist()}
    _, expected = theirs.plot(skip_start=10, skip_end=5, ax=figure.subplots())
    # numpy's gradient is central, fastai's difference is one-sided: they agree to one neighbour.
    ours = lr_suggestion(lrs[10:-5], losses[10:-5], "steepest")
    assert abs(torch.log10(torch.tensor(ours / expected)).item()) <= 1.01 * 8 / 99


def test_noise_of_one_in_ten_thousand_does_not_move_the_suggestion() -> None:
    from lightning.pytorch.tuner.lr_finder import _LRFinder

    lrs, losses = noisy_curve(1e-4)
    lightning = _LRFinder("exponential", 1e-8, 1.0, 100)
    lightning.results = {"lr": lrs.tolist(), "loss": losses.tolist()}
    assert lightning.suggestion() < 1e-6
    kept, smoothed = trim_curve(lrs.tolist(), losses.tolist(), smoothing=0.0)
    assert 3e-3 < lr_suggestion(kept, smoothed, "steepest") < 3e-2
    assert 3e-3 < lr_suggestion(kept, smoothed, "minimum") < 3e-2
    assert 1e-4 < lr_suggestion(kept, smoothed, "valley") < 3e-2


def test_smoothing_is_a_weighted_mean_of_the_past() -> None:
    losses = torch.randn(30, dtype=torch.float64)
    for i, smoothed in enumerate(smooth_losses(losses, 0.9)):
        weights = 0.9 ** torch.arange(i, -1, -1, dtype=torch.float64)
        assert smoothed.item() == pytest.approx(((weights * losses[: i + 1]).sum() / weights.sum()).item())
    assert torch.equal(smooth_losses(losses, 0.0), losses)
    torch.testing.assert_close(smooth_losses(torch.full((9,), 3.0)), torch.full((9,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("smoothing", [0.5, 0.9, 0.98])
def test_a_curve_that_never_falls_is_an_error(seed: int, smoothing: float) -> None:
    torch.manual_seed(seed)
    lrs = torch.logspace(-7, 0, 100, dtype=torch.float64)
    for losses in (2 + 20 * lrs, 2 + 0 * lrs, 2 + 20 * lrs + 0.1 * torch.randn(100)):
        with pytest.raises(ValueError, match="to fall somewhere in the sweep"):
            trim_curve(lrs.tolist(), losses.tolist(), smoothing)


@pytest.mark.parametrize("seed", range(8))
def test_a_fall_that_one_sees_through_the_noise_is_one(seed: int) -> None:
    lrs, losses = noisy_curve(0.7, seed)  # falls by 1.5: twice the noise of a single batch
    kept, smoothed = trim_curve(lrs.tolist(), losses.tolist())
    assert 1e-4 < lr_suggestion(kept, smoothed, "valley") < 0.5


def test_pure_noise_is_hardly_ever_a_fall() -> None:
    generator = torch.Generator().manual_seed(0)
    heights = [height_of_fall(torch.randn(100, generator=generator)) for _ in range(400)]
    assert sum(height > 4 for height in heights) <= 6


def test_the_curve_is_cut_at_the_first_loss_that_is_not_finite() -> None:
    lrs, losses = noisy_curve(0.0)
    losses[90] = float("nan")
    kept, smoothed = trim_curve(lrs.tolist(), losses.tolist())
    assert torch.equal(kept, lrs[10:85])
    assert torch.equal(smoothed, smooth_losses(losses[:90])[10:85])


def test_bad_input_names_the_argument() -> None:
    lrs, losses = noisy_curve(0.0)
    with pytest.raises(ValueError, match="`rule` to be one of valley"):
        lr_suggestion(lrs, losses, "best")
    with pytest.raises(ValueError, match="`smoothing` to be in"):
        smooth_losses(losses, 1.0)
    with pytest.raises(ValueError, match="at least 16 points, but got 100 and 3"):
        lr_suggestion(lrs, losses[:3])
    with pytest.raises(ValueError, match="`losses` to be finite"):
        lr_suggestion(lrs, losses * float("inf"))
    with pytest.raises(ValueError, match="finite loss at the start of the sweep, but step 1 gave nan"):
        trim_curve([1.0, 2.0, 3.0], [float("nan")] * 3)
    with pytest.raises(ValueError, match="at least 16 points of the curve"):
        trim_curve(lrs[:20].tolist(), losses[:20].tolist())
