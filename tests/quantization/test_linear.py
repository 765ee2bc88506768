import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_distill.quantization import Hessian, QuantEmbedding, QuantLinear, gptq_layer, use_kernels


def quantized(bits: int = 4, group_size: int = 32, width: int = 64, out: int = 32, **options) -> tuple:
    inputs, weight, bias = torch.randn(200, width), torch.randn(out, width), torch.randn(out)
    hessian = Hessian(width)
    hessian.update(inputs)
    result = gptq_layer(weight, hessian.matrix(), bits=bits, group_size=group_size, **options)
    return result, QuantLinear.from_weight(result, bias), inputs, bias


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"sym": False}, {"static_groups": False}, {"group_size": -1}], ids=str)
def test_forward_is_that_of_the_dequantised_weight(bits: int, options: dict) -> None:
    result, layer, inputs, bias = quantized(bits, **options)
    assert torch.equal(layer.dequantize(), result.dequantize())
    torch.testing.assert_close(layer(inputs), F.linear(inputs, result.dequantize(), bias))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_state_dict_round_trip_is_bit_exact(bits: int) -> None:
    _, layer, inputs, _ = quantized(bits)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QuantLinear(64, 32, bits, 32)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert sorted(layer.state_dict()) == ["bias", "g_idx", "qweight", "qzeros", "scales"]
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer(inputs), other(inputs))


def test_no_dense_copy_is_kept() -> None:
    _, layer, inputs, _ = quantized(4, width=256, out=256, group_size=128)
    layer(inputs[:3])
    held = sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())
    assert not list(layer.parameters())
    assert held < 256 * 256 * 4 / 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_and_autocast_move_activations_only(dtype: torch.dtype) -> None:
    _, layer, inputs, _ = quantized(4)
    expected, scales = layer(inputs), layer.scales.clone()
    with torch.autocast("cpu", dtype):
        assert layer(inputs).dtype == dtype
    layer.to(dtype)
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.scales, scales)
    assert layer(inputs.to(dtype)).dtype == dtype
    torch.testing.assert_close(layer(inputs.to(dtype)).float(), expected, rtol=0.05, atol=0.15)


def test_gradients_reach_the_inputs() -> None:
    result, layer, inputs, _ = quantized(4)
    inputs.requires_grad_()
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad[0], result.dequantize().sum(0))


@pytest.mark.parametrize("sym", [True, False])
def test_kernel_gives_the_answer_in_bfloat16_and_says_when_it_cannot(sym: bool) -> None:
    _, layer, inputs, _ = quantized(4, sym=sym)
    expected = layer(inputs[:5])
    assert layer.use_kernel() is None
    fast = layer(inputs[:5].view(1, 5, 64))
    assert not torch.equal(fast[0], expected)
    assert (fast[0] - expected).norm() < 0.01 * expected.norm()
    assert "_kernel_weight" not in layer.state_dict()
    assert torch.equal(layer.to("cpu").float()(inputs[:5]), fast[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs[:5]).dtype == torch.bfloat16
    layer.load_state_dict(quantized(4, sym=sym)[1].state_dict())  # other numbers: exact again
    torch.testing.assert_close(layer(inputs[:5]), F.linear(inputs[:5], layer.dequantize(), layer.bias))


def test_int8_kernel_gives_the_answer_in_bfloat16() -> None:
    _, layer, inputs, _ = quantized(8, group_size=-1)
    expected = layer(inputs)
    assert layer.use_kernel() is None
    assert 0 < (layer(inputs[:5]) - expected[:5]).norm() < 0.01 * expected[:5].norm()


@pytest.mark.parametrize(
    ("bits", "options", "reason"),
    [
        (3, {}, "3 bits"),
        (2, {}, "2 bits"),
        (4, {"static_groups": False}, "neighbouring"),
        (4, {"group_size": 48}, "neighbouring"),
        (4, {"out": 40}, "40 outputs"),
        (4, {"group_size": -1, "width": 96}, "group size 96"),
        (8, {}, "one scale per output"),
        (8, {"group_size": -1, "sym": False}, "not in the middle"),
    ],
    ids=str,
)
def test_layers_that_no_kernel_fits_say_why_and_stay_exact(bits: int, options: dict, reason: str) -> None:
    _, layer, inputs, _ = quantized(bits, **options)
    expected = layer(inputs)
    assert reason in use_kernels(nn.Sequential(layer))["0"]
    assert torch.equal(layer(inputs), expected)


def test_compiles_whole() -> None:
    _, layer, inputs, _ = quantized(4)
    explained = torch._dynamo.explain(layer)(inputs)
    assert explained.graph_break_count == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_embedding_rows_are_within_half_a_step(bits: int) -> None:
    embedding = nn.Embedding(20, 32, padding_idx=0)
    layer = QuantEmbedding.from_embedding(embedding, bits)
    indices = torch.randint(0, 20, (3, 7))
    left = (layer(indices) - embedding(indices)).abs()
    # The symmetric grid's top is half a step below the largest weight, and float16 moves it by 127 * 2^-11 steps.
    assert (left <= 0.6 * layer.scales.float()[indices][..., None] + 1e-6).all()
    assert (layer(torch.tensor([0])) == 0).all()
    assert layer.to(torch.bfloat16)(indices).dtype == torch.bfloat16
    assert layer.scales.dtype == torch.float16


def test_sizes_the_format_cannot_hold_are_said() -> None:
    with pytest.raises(ValueError, match="33 inputs"):
        QuantLinear(33, 32, 4, 32)
    with pytest.raises(ValueError, match="16 outputs"):
        QuantLinear(32, 16, 3, 32)
    with pytest.raises(ValueError, match="embedding_bits"):
        QuantEmbedding(4, 32, 3)
