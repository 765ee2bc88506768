import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from lightning_distill.quantization import Hessian, gptq_layer
from lightning_distill.quantization.gptq import retarget
from lightning_distill.quantization.grid import find_grid
from lightning_distill.quantization.hessian import upper_factor
from tests.quantization.paper import paper_gptq

OPTIONS = [
    {"bits": bits, "group_size": group_size, **flags}
    for bits, group_size in [(2, 32), (3, 64), (4, 128), (4, -1), (8, 32)]
    for flags in (
        {},
        {"sym": False},
        {"mse": True},
        {"static_groups": False},
        {"desc_act": False},
        {"desc_act": False, "static_groups": False, "sym": False},
    )
]


def correlated(rows: int, width: int) -> Tensor:
    """Inputs as layers see them: correlated, a few loud features, a mean."""
    mixed = torch.randn(rows, width) @ torch.randn(width, width) / math.sqrt(width)
    return mixed * torch.logspace(-1, 1, width)[torch.randperm(width)] + 0.3


def hessian_of(inputs: Tensor) -> Tensor:
    hessian = Hessian(inputs.shape[-1])
    hessian.update(inputs)
    return hessian.matrix()


def loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    left = weight.double() - quantized.double()
    return float(((left @ hessian.double()) * left).sum())


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(st.integers(0, 3000), min_size=1, max_size=4), width=st.sampled_from([3, 40, 300]))
def test_hessian_is_twice_the_mean_outer_product_however_the_inputs_arrive(rows: list[int], width: int) -> None:
    batches = [torch.randn(n, width) for n in rows]
    hessian = Hessian(width)
    for batch in batches:
        hessian.update(batch)
    inputs = torch.cat(batches).double()
    matrix = hessian.matrix()
    assert hessian.count == sum(rows)
    torch.testing.assert_close(matrix.double(), 2 * inputs.T @ inputs / max(1, sum(rows)), rtol=1e-4, atol=1e-4)
    assert torch.equal(matrix, matrix.T)


def test_factor_is_the_inverse_of_the_papers_in_float64() -> None:
    hessian = hessian_of(correlated(2000, 96))
    factor, share, damp = upper_factor(hessian)
    damped = hessian.double() + damp * torch.eye(96)
    papers = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert share == 0.01
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(torch.linalg.inv(factor.double()), papers, rtol=1e-3, atol=1e-4)


def test_damping_is_raised_tenfold_until_there_is_a_factor() -> None:
    hessian = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # indefinite by 0.05, as float16 sums can leave it
    _, share, damp = upper_factor(hessian, 0.001)
    assert (share, damp) == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="no Cholesky factor"):
        upper_factor(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_papers_algorithm(options: dict) -> None:
    # 144 inputs: the last group of 32 or 64 does not fill, and work crosses the block of 128.
    inputs, weight = correlated(1000, 144), torch.randn(24, 144)
    hessian = hessian_of(inputs)
    ours = gptq_layer(weight, hessian, **options)
    papers = paper_gptq(weight, hessian, **options)
    # One value that float32 and float64 round apart changes all that follow in its row: most rows are exactly equal,
    # and no row is worse by more than such a tie.
    equal = (ours.dequantize() - papers).abs().amax(1) < 1e-4
    assert equal.float().mean() > 0.7
    assert loss(weight, ours.dequantize(), hessian) < 1.02 * loss(weight, papers, hessian)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_below_rounding_and_errors_are_those_of_the_outputs(options: dict) -> None:
    inputs, weight = correlated(1000, 144), torch.randn(24, 144)
    quantized = gptq_layer(weight, hessian_of(inputs), **options)
    assert quantized.error < quantized.rounding_error
    lost = ((weight - quantized.dequantize()) @ inputs.T).square().mean(1)
    torch.testing.assert_close(quantized.errors, lost, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(quantized.powers, (weight @ inputs.T).square().mean(1), rtol=1e-3, atol=1e-7)
    assert int(quantized.codes.max()) < 2 ** options["bits"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_diagonal_hessian_rounds_to_nearest(bits: int) -> None:
    weight, hessian = torch.randn(16, 64), torch.diag(torch.rand(64) + 0.1)
    ours = gptq_layer(weight, hessian, bits=bits, group_size=32)
    nearest = gptq_layer(weight, None, bits=bits, group_size=32)
    assert torch.equal(ours.codes, nearest.codes)
    assert torch.equal(ours.scales, nearest.scales)
    assert ours.error == ours.rounding_error


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), correlation=st.floats(-0.95, 0.95))
def test_two_inputs_reach_the_best_answer_the_first_rounding_leaves(seed: int, correlation: float) -> None:
    """With the first input rounded, the second is a one-dimensional problem: GPTQ's answer is its optimum."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 2, generator=generator)
    hessian = torch.tensor([[2.0, correlation], [correlation, 1.0]])
    ours = gptq_layer(weight, hessian, bits=2, group_size=-1, damp_percent=0.0)
    scale, zero = find_grid(weight, bits=2)
    candidates = [scale * (torch.tensor([[first, second]]) - zero) for first in range(4) for second in range(4)]
    nearest = ours.dequantize()[0, 0]
    rivals = [candidate for candidate in candidates if candidate[0, 0] == nearest]
    best = min(loss(weight, rival, hessian) for rival in rivals)
    assert loss(weight, ours.dequantize(), hessian) == pytest.approx(best, rel=1e-4, abs=1e-6)


def test_small_problems_are_between_brute_force_and_rounding() -> None:
    ours_total = best_total = nearest_total = 0.0
    for _ in range(20):
        weight, hessian = torch.randn(1, 4), hessian_of(correlated(100, 4))
        scale, zero = find_grid(weight, bits=3)
        codes = torch.tensor(list(itertools.product(range(8), repeat=4)))
        best = min(loss(weight, candidate[None], hessian) for candidate in scale * (codes - zero))
        ours = loss(weight, gptq_layer(weight, hessian, bits=3, group_size=-1).dequantize(), hessian)
        nearest = loss(weight, gptq_layer(weight, None, bits=3, group_size=-1).dequantize(), hessian)
        assert best <= ours * (1 + 1e-6)
        assert ours <= nearest * (1 + 1e-6)
        ours_total, best_total, nearest_total = ours_total + ours, best_total + best, nearest_total + nearest
    assert ours_total < best_total + 0.5 * (nearest_total - best_total)


def test_below_rounding_on_real_weights_and_activations(shared) -> None:
    """The first feed-forward layer of a real teacher, on the embeddings of real words."""
    tensors = load_file(shared / "models" / "sst2-minilm-l6" / "model.safetensors")
    prefix = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    layer = next(name for name in tensors if name.endswith("layer.0.attention.self.query.weight"))
    inputs = torch.nn.functional.layer_norm(tensors[prefix][1000:6000].float(), (384,))
    weight, hessian = tensors[layer][:32].float(), hessian_of(inputs)
    for options in OPTIONS:
        quantized = gptq_layer(weight, hessian, **options)
        assert quantized.error < quantized.rounding_error, options


def test_dead_inputs_are_rounded_and_disturb_nobody() -> None:
    inputs, weight = correlated(500, 64), torch.randn(8, 64)
    inputs[:, [3, 40]] = 0
    alive = [i for i in range(64) if i not in (3, 40)]
    quantized = gptq_layer(weight, hessian_of(inputs), group_size=-1)
    scale, _ = find_grid(weight, bits=4)
    dead = quantized.dequantize()[:, [3, 40]]
    assert ((dead - weight[:, [3, 40]]).abs() <= scale[:, None] * 0.51 + 1e-6).float().mean() > 0.8
    assert quantized.error < quantized.rounding_error
    assert quantized.dequantize()[:, alive].isfinite().all()


def test_layers_with_the_same_inputs_are_quantised_as_one() -> None:
    hessian = hessian_of(correlated(500, 64))
    query, key = torch.randn(8, 64), torch.randn(4, 64)
    both = gptq_layer(torch.cat([query, key]), hessian, bits=3, group_size=32)
    alone = gptq_layer(key, hessian, bits=3, group_size=32)
    part = both.rows(8, 12)
    assert torch.equal(part.codes, alone.codes)
    assert part.error == pytest.approx(alone.error, rel=1e-4)


def test_retargeted_weight_is_the_least_squares_answer_on_the_inputs_as_they_are() -> None:
    wanted, weight = correlated(500, 48), torch.randn(8, 48)
    inputs = wanted + 0.1 * correlated(500, 48)
    drift = 2 * (wanted - inputs).T @ inputs / 500
    ours = retarget(weight, hessian_of(inputs), drift, damp_percent=0.0)
    best = torch.linalg.lstsq(inputs.double(), (wanted @ weight.T).double()).solution.T
    torch.testing.assert_close(ours.double(), best, rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    mse=st.booleans(),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    size=st.sampled_from([1e-9, 1.0, 1e4]),
)
def test_grid_holds_every_value_and_float16_holds_the_grid_where_it_can(
    seed: int, bits: int, sym: bool, mse: bool, shift: float, size: float
) -> None:
    values = (torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) + shift) * size
    scale, zero = find_grid(values, bits, sym=sym, mse=mse)
    top = 2**bits - 1
    short = scale >= 2**-16
    assert torch.equal(scale[short], scale[short].half().float())
    assert (scale > 0).all()
    assert ((zero >= 1) & (zero <= top) & (zero == zero.round())).all()
    if not mse:
        slack = 1.01 * scale[:, None] * (1.0 if not sym else 0.51) + 1e-3 * values.abs().amax()
        assert (values >= -scale[:, None] * zero[:, None] - slack).all()
        assert (values <= scale[:, None] * (top - zero[:, None]) + slack).all()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    bits=st.sampled_from([2, 3, 4, 8]),
    options=st.sampled_from([{}, {"sym": False}, {"mse": True}, {"static_groups": False}, {"group_size": -1}]),
    rounded=st.booleans(),
    powers=st.lists(st.integers(-26, 13), min_size=3, max_size=3),
)
def test_what_is_lost_does_not_depend_on_how_large_the_weights_are(
    seed: int, bits: int, options: dict, rounded: bool, powers: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 64, generator=generator)
    hessian = None if rounded else hessian_of(torch.randn(200, 64, generator=generator))
    # Rows do not know of each other, so each may have a magnitude of its own. Powers of two, which round nothing: with
    # any other factor a weight between two codes may take the other one, and all weights after it make that good.
    sizes = 2.0 ** torch.tensor(powers)[:, None]
    lost = []
    for factor in (torch.ones(3, 1), sizes):
        result = gptq_layer(weight * factor, hessian, bits=bits, **{"group_size": 32, **options})
        dense = result.dequantize()
        lost.append((dense / factor - weight).square().sum(1) / weight.square().sum(1))
    # A scale is a float16, which rounds more below 2**-14: that of 8 bits is there for weights below 2**-6.
    normal = sizes[:, 0] >= 2.0**-6
    torch.testing.assert_close(lost[1][normal], lost[0][normal], rtol=1e-3, atol=0)
    torch.testing.assert_close(lost[1], lost[0], rtol=0.5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "`bits`"),
        ({"group_size": 0}, "`group_size`"),
        ({"damp_percent": 2.0}, "`damp_percent`"),
        ({"weight": torch.full((2, 4), math.nan)}, "`weight` to be finite"),
        ({"weight": torch.zeros(2, 4, 1)}, "shape"),
        ({"hessian": torch.zeros(3, 3)}, "`hessian` to have shape"),
        ({"hessian": torch.full((4, 4), math.inf)}, "`hessian` to be finite"),
        ({"hessian": torch.zeros(4, 4)}, "at least one input"),
    ],
)
def test_bad_input_is_said(change: dict, message: str) -> None:
    arguments = {"weight": torch.ones(2, 4), "hessian": torch.eye(4), **change}
    with pytest.raises(ValueError, match=message):
        gptq_layer(**arguments)
