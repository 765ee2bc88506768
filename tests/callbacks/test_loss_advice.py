"""LossAdvice: what it makes of curves, and that it says so after a fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distill.callbacks import LossAdvice
from tests.callbacks.registry import Regression, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([2.0, 1.0, 0.5], "falling"),
        ([2.0, 1.0, 1.05], "falling"),
        ([2.0, 1.0, 1.5], "diverging"),
        ([2.0, 2.0, float("nan")], "diverging"),
        ([2.0, 1.999, 1.995], "flat"),
        ([2.0, 2.0, 2.1], "flat"),
        ([2.0, 1.0], "too short"),
        ([-1.0, -2.0, -3.0], "falling"),
    ],
)
def test_verdicts(losses: list[float], verdict: str) -> None:
    assert LossAdvice.judge(torch.tensor(losses)) == verdict


@pytest.mark.parametrize(("lr", "advice"), [(0.0, "higher by a factor of 5"), (50.0, "lower by a factor of 10")])
def test_it_speaks_after_the_fit(lr: float, advice: str, tmp_path: Path) -> None:
    class WithRate(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr)

    # Whole passes over the eight batches, so that windows are comparable.
    with pytest.warns(UserWarning, match=advice):
        trainer(tmp_path, LossAdvice(window=8), max_steps=32).fit(WithRate())


def test_a_curve_that_falls_needs_no_advice(tmp_path: Path) -> None:
    advice = LossAdvice(window=8)
    trainer(tmp_path, advice, max_steps=32).fit(Regression())
    assert advice.verdict == "falling"
