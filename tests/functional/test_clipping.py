"""Clipping as functions on gradients: against torch, timm and numpy."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_distill.functional.clipping import (
    all_finite,
    clip_adaptively_,
    clip_by_value_,
    group_tensors,
    norm_coefficient,
    percentile_threshold,
    running_moments,
    scale_,
    total_norm,
    zscore_threshold,
)


def timm_agc() -> Any:
    """timm's own function, from its file: importing the package would need torchvision."""
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        pytest.skip("needs `timm` of benchmarks/requirements.txt, which is absent")
    spec = importlib.util.spec_from_file_location("timm_agc", Path(package.origin).parent / "utils" / "agc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adaptive_clip_grad


shapes = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=4), min_size=1, max_size=5)
magnitudes = st.floats(1e-4, 1e4)
seeds = st.integers(0, 2**31)


def parameters_like(shapes: list[list[int]], magnitude: float, seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * magnitude
    return parameters


def twice(*arguments: Any) -> tuple[list[nn.Parameter], list[nn.Parameter], list[list[Tensor]]]:
    ours, theirs = parameters_like(*arguments), parameters_like(*arguments)
    return ours, theirs, group_tensors(parameter.grad for parameter in ours if parameter.grad is not None)


def assert_same_gradients(ours: list[nn.Parameter], theirs: list[nn.Parameter], **tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, **tolerance)


@given(shapes, magnitudes, seeds, st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=50)
def test_norm_equals_torch(shapes: list[list[int]], magnitude: float, seed: int, threshold: float) -> None:
    ours, theirs, groups = twice(shapes, magnitude, seed)
    norm = total_norm(groups)
    scale_(groups, norm_coefficient(norm, threshold))
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, threshold))
    assert_same_gradients(ours, theirs, rtol=0.0, atol=0.0)


@given(shapes, magnitudes, seeds, st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=50)
def test_value_equals_torch(shapes: list[list[int]], magnitude: float, seed: int, threshold: float) -> None:
    ours, theirs, groups = twice(shapes, magnitude, seed)
    clip_by_value_(groups, threshold)
    nn.utils.clip_grad_value_(theirs, threshold)
    assert_same_gradients(ours, theirs, rtol=0.0, atol=0.0)


@given(shapes, magnitudes, seeds, st.floats(1e-3, 1.0), st.floats(1e-5, 1.0))
@settings(deadline=None, max_examples=50)
def test_adaptive_equals_timm(
    shapes: list[list[int]], magnitude: float, seed: int, threshold: float, eps: float
) -> None:
    ours, theirs, _ = twice(shapes, magnitude, seed)
    clip_adaptively_(group_tensors(ours), threshold, eps)
    timm_agc()(theirs, threshold, eps)
    assert_same_gradients(ours, theirs, rtol=1e-5, atol=0.0)


@given(st.lists(st.floats(2**-10, 2**10, width=32), min_size=1, max_size=30), st.floats(0.1, 100), st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_percentile_equals_numpy(norms: list[float], percentile: float, empty: int) -> None:
    history = torch.tensor(norms + [math.nan] * empty)
    wanted = np.percentile(np.array(norms), percentile)
    assert percentile_threshold(history, percentile).item() == pytest.approx(wanted, rel=1e-5)


@given(st.lists(st.floats(2**-6, 2**7, width=32), min_size=6, max_size=20), st.floats(0.5, 3), st.floats(0.5, 0.99))
@settings(deadline=None, max_examples=50)
def test_zscore_equals_the_papers_arithmetic_on_numbers(norms: list[float], threshold: float, decay: float) -> None:
    norms64 = [float(norm) for norm in norms]
    mean, variance = float(np.mean(norms64[:4])), float(np.var(norms64[:4]))
    state = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for count, norm in enumerate(norms64):
        value = torch.tensor(norm, dtype=torch.float64)
        bound = zscore_threshold(value, *state, threshold) if count >= 4 else torch.tensor(math.inf).double()
        if count >= 4:
            z = (norm - mean) / (math.sqrt(variance) + 1e-6)
            wanted = mean + threshold / z * threshold * math.sqrt(variance) if z > threshold else math.inf
            assert bound.item() == pytest.approx(wanted, rel=1e-6)
            effective = min(norm, wanted)
            mean = decay * mean + (1 - decay) * effective
            variance = decay * variance + (1 - decay) * (effective - mean) ** 2
        state = running_moments(value.minimum(bound), *state, torch.tensor(count), 4, decay)
        if count == 3:
            # Both are exact up to rounding; from here on the two take the same steps from the same place.
            assert state[0].item() == pytest.approx(mean, rel=1e-6)
            assert state[1].item() == pytest.approx(variance, rel=1e-6, abs=1e-6 * mean**2)
            state = torch.tensor(mean).double(), torch.tensor(variance).double()


def test_half_precision_norms_do_not_overflow() -> None:
    gradient = torch.full((4,), 60000.0, dtype=torch.float16)
    assert total_norm([[gradient]]).item() == pytest.approx(120000, rel=1e-3)


@given(
    st.lists(st.floats(width=16), min_size=1, max_size=6),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
@settings(deadline=None, max_examples=50)
def test_all_finite_says_what_isfinite_says_and_changes_nothing(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    copy = tensor.clone()
    assert all_finite([[torch.ones(3, 2, dtype=dtype), tensor], [torch.ones(1)]]) == tensor.isfinite().all()
    assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))


def test_gradients_of_several_types_count_as_one_vector() -> None:
    groups = group_tensors([torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)])
    assert len(groups) == 2
    assert total_norm(groups).item() == pytest.approx(5.0)
