"""Measures against scipy, at the edges; NaN is never sure."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from lightning_distill import functional
from lightning_distill.early_exit import AllOf, AnyOf, Confidence, Criterion, Entropy, LearnedGate, Margin, Patience
from lightning_distill.early_exit.criteria import criterion_from

LOGITS = arrays(np.float64, (5, 4), elements=st.floats(-200, 200))


@given(LOGITS)
def test_measures_are_those_of_scipy(logits: np.ndarray) -> None:
    tensor, p = torch.from_numpy(logits), softmax(logits, -1)
    ordered = np.sort(p, -1)
    np.testing.assert_allclose(functional.confidence(tensor), p.max(-1), rtol=1e-9)
    np.testing.assert_allclose(functional.normalized_entropy(tensor), entropy(p, axis=-1, base=4), atol=1e-9)
    np.testing.assert_allclose(functional.margin(tensor), ordered[:, -1] - ordered[:, -2], atol=1e-9)


def test_the_surest_rows_have_an_entropy_of_zero_in_every_precision() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert 0 <= functional.normalized_entropy(torch.tensor([100.0, -100.0], dtype=dtype)).item() < 1e-80


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("criterion", [Confidence(0.0), Entropy(1.0), Margin(0.0), Patience(1)], ids=str)
def test_a_row_that_is_not_finite_is_never_sure(criterion: Criterion, bad: float) -> None:
    logits = torch.tensor([[1.0, bad], [1.0, 2.0]])
    state = criterion.begin(logits.shape[:-1], logits.device)
    for _ in range(3):
        measure, state = criterion.measure(logits, None, state)
    assert criterion.threshold is not None
    assert criterion.sure(measure, criterion.threshold).tolist() == [False, True]


def test_patience_counts_agreements_in_a_row() -> None:
    criterion = Patience(2)
    answers = [0, 0, 1, 1, 1]
    state = criterion.begin(torch.Size([1]), torch.device("cpu"))
    runs = []
    for answer in answers:
        measure, state = criterion.measure(torch.nn.functional.one_hot(torch.tensor([answer]), 2).float(), None, state)
        runs.append(measure.item())
    assert runs == [0, 1, 0, 1, 2]


def test_patience_in_regression_is_about_distance() -> None:
    criterion = Patience(1, tolerance=0.1)
    state = criterion.begin(torch.Size([2]), torch.device("cpu"))
    _, state = criterion.measure(torch.tensor([[1.0], [1.0]]), None, state)
    measure, _ = criterion.measure(torch.tensor([[1.05], [1.2]]), None, state)
    assert criterion.sure(measure, 1).tolist() == [True, False]


def sure(criterion: Criterion, logits: Tensor) -> list[bool]:
    state = criterion.begin(logits.shape[:-1], logits.device)
    measure, _ = criterion.measure(logits, None, state)
    assert criterion.threshold is not None
    return criterion.sure(measure, criterion.threshold).tolist()


def test_any_and_all() -> None:
    logits = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.5, 3.0], [0.0, 0.0, 5.0]])
    parts = (Confidence(0.55), Entropy(0.8))
    one, other = (torch.tensor(sure(part, logits)) for part in parts)
    assert not torch.equal(one, other)
    assert sure(AnyOf(*parts), logits) == (one | other).tolist()
    assert sure(AllOf(*parts), logits) == (one & other).tolist()


@pytest.mark.parametrize(
    "criterion",
    [Confidence(0.9), Entropy(0.1), Margin(), LearnedGate(0.7), Patience(2, 0.1), AllOf(Confidence(0.9), Patience(1))],
    ids=str,
)
def test_a_criterion_comes_back_from_its_config(criterion: Criterion) -> None:
    assert repr(criterion_from(criterion.config())) == repr(criterion)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Confidence(1.5), "`threshold` to be at least 0 and at most 1, but got 1.5"),
        (lambda: Entropy(-0.1), "`threshold`"),
        (lambda: Patience(0), "`threshold` to be at least 1"),
        (lambda: Patience(1, tolerance=0.0), "`tolerance`"),
        (lambda: AnyOf(), "`criteria`"),
        (lambda: AnyOf(Confidence()), "`criteria`"),
        (lambda: criterion_from({"name": "Luck"}), "`criterion` to name one of"),
    ],
)
def test_bad_arguments_are_named(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        build()
