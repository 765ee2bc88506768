"""What a layer is to others beside a product with its weight: kept, or the layer stays in floating point."""

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_distill.quantization import QuantEmbedding, QuantLinear, load, quantize, quantize_int8, save
from lightning_distill.quantization.packed_weight import PackedWeight
from tests.quantization.test_model import t5

INPUTS = [torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def hooked(register: str, hook: Callable) -> Callable[[nn.Linear], nn.Module]:
    def change(layer: nn.Linear) -> nn.Module:
        getattr(layer, register)(hook)
        return layer

    return change


def old_weight_norm(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer)


def other_forward(layer: nn.Linear) -> nn.Module:
    layer.forward = lambda inputs: F.linear(inputs, 2 * layer.weight, layer.bias)
    return layer


class Doubled(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


CHANGES = {
    "forward_hook": hooked("register_forward_hook", lambda module, inputs, output: 3 * output),
    "forward_pre_hook": hooked("register_forward_pre_hook", lambda module, inputs: (inputs[0] + 1,)),
    "full_backward_hook": hooked("register_full_backward_hook", lambda module, inputs, outputs: (5 * inputs[0],)),
    "full_backward_pre_hook": hooked("register_full_backward_pre_hook", lambda module, outputs: (5 * outputs[0],)),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old_weight_norm": old_weight_norm,
    "old_spectral_norm": torch.nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "subclass": lambda layer: Doubled(32, 32),
    "other_forward": other_forward,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_layer_does_beside_its_product_is_kept_and_said(change: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), CHANGES[change](nn.Linear(32, 32))).eval()
    quantized, report = quantize(model, INPUTS, bits=8, group_size=32)
    assert [type(layer) for layer in quantized[::2]] == [QuantLinear, type(model[2])]
    assert [layer.bits for layer in report] == [8, 0]
    assert report[1].note.startswith("left in floating point: ")
    answers = []
    for one in (model, quantized):
        inputs = INPUTS[0].clone().requires_grad_()
        output = one(inputs)
        output.square().sum().backward()
        answers.append((output.detach(), inputs.grad))
    for expected, got in zip(*answers, strict=True):
        assert (got - expected).norm() < 0.03 * expected.norm()
    # Names, so that a state dict is loaded as before.
    assert [key for key in quantized.state_dict() if key.startswith("2.")] == list(model[2].state_dict(prefix="2."))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra `int8`")
@pytest.mark.parametrize("change", CHANGES)
def test_int8_keeps_it_too(change: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), CHANGES[change](nn.Linear(32, 32))).eval()
    with pytest.warns(UserWarning, match="1 linear layers stay in floating point: `2`, "):
        quantized = quantize_int8(model)
    assert type(quantized[0].weight).__name__ == "Int8Tensor"
    with torch.no_grad():
        expected = model(INPUTS[0])
        assert (quantized(INPUTS[0]) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra `int8`")
def test_int8_leaves_weights_that_torchao_would_round_to_nothing() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight[3] *= 1e-6
        model[1].weight[3] = 0
    with pytest.warns(UserWarning, match="`0`, an output has no weight above 1.5e-05"):
        quantized = quantize_int8(model)
    assert [type(layer.weight).__name__ for layer in quantized] == ["Parameter", "Int8Tensor"]


class Reader(nn.Module):
    """Computes with its child's weight and bias, and reads what else it has."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(32, 32), nn.Linear(32, 32)
        self.words = nn.Embedding(256, 32)
        self.read.gain = 0.5

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.read.weight
        assert (weight.shape, weight.device) == ((self.read.out_features, self.read.in_features), inputs.device)
        hidden = self.read.gain * F.linear(self.called(inputs).to(weight.dtype), weight, self.read.bias)
        return hidden @ self.words.weight.T + (self.read.weight**2).sum() + self.called.weight.norm()


def test_who_reads_a_weight_gets_its_numbers() -> None:
    torch.manual_seed(0)
    model = Reader()
    quantized, report = quantize(model, INPUTS, bits=8, group_size=32, embedding_bits=8)
    assert isinstance(quantized.words, QuantEmbedding)
    assert report[1].note == "rounded to nearest: no calibration input reached it"
    expected = model(INPUTS[0])
    assert (quantized(INPUTS[0]) - expected).norm() < 0.01 * expected.norm()
    assert torch.equal(copy.deepcopy(quantized)(INPUTS[0]), quantized(INPUTS[0]))
    assert quantized.bfloat16().read.weight.dtype == torch.bfloat16


def test_a_weight_that_is_read_cannot_be_written() -> None:
    quantized, _ = quantize(nn.Sequential(nn.Linear(32, 32)), None, group_size=32)
    weight = quantized[0].weight
    assert isinstance(weight, PackedWeight)
    assert type(weight + 1) is Tensor
    with pytest.raises(TypeError, match="read only"), torch.no_grad():
        weight.mul_(2)
    with pytest.raises(TypeError, match="read only"):
        nn.init.zeros_(weight)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("first_in_floating_point", [False, True])
def test_torchs_transformer_layers_beside_their_fast_path(nested: bool, first_in_floating_point: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    mask = torch.arange(10) >= torch.tensor([10, 7, 4, 10])[:, None]
    data = [{"src": torch.randn(4, 10, 64), "src_key_padding_mask": mask} for _ in range(8)]
    by_pattern = {"layers.0.*": 0} if first_in_floating_point else {}
    # torch's own word on a prototype.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        quantized, report = quantize(model, data, bits=8, group_size=32, bits_by_pattern=by_pattern)
        notes = {entry.name: entry.note for entry in report}
        with torch.no_grad():
            got, expected = quantized(**data[0])[~mask], model(**data[0])[~mask]
    assert isinstance(quantized.layers[1].linear1, QuantLinear)
    assert notes["layers.1.linear1"] == ""
    assert "NonDynamicallyQuantizableLinear" in notes["layers.1.self_attn.out_proj"]
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_a_float_layer_in_the_same_memory_is_not_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    model[1].weight.data = model[0].weight.data  # another parameter, the same numbers
    model.kept = nn.Parameter(model[0].weight.detach())
    quantized, report = quantize(model, INPUTS, bits=2, group_size=32, bits_by_pattern={"1": 0})
    assert [layer.bits for layer in report] == [2, 0]
    assert torch.equal(quantized[1].weight, model[1].weight)
    assert torch.equal(quantized.kept, model.kept)


def test_a_weight_that_is_an_embeddings_stays_and_is_said() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.body, self.out = nn.Embedding(256, 32), nn.Linear(32, 32), nn.Linear(32, 256)
            self.out.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.body(self.words(ids)))

    quantized, report = quantize(Tied(), [torch.randint(256, (8, 8))], bits=4, group_size=32)
    assert report[1].note == "left in floating point: an embedding has the same weight"
    assert quantized.out.weight is quantized.words.weight


def test_embeddings_that_do_more_stay_and_are_said() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.bounded = nn.Embedding(256, 32), nn.Embedding(256, 32, max_norm=1.0)
            self.hooked, self.body = nn.Embedding(256, 32), nn.Linear(32, 32)
            self.hooked.register_forward_hook(lambda module, inputs, output: 2 * output)

        def forward(self, ids: Tensor) -> Tensor:
            return self.body(self.plain(ids) + self.bounded(ids) + self.hooked(ids))

    quantized, report = quantize(Words(), [torch.randint(256, (8, 8))], group_size=32, embedding_bits=8)
    assert isinstance(quantized.plain, QuantEmbedding)
    assert {entry.name: entry.note for entry in report[1:]} == {
        "bounded": "left in floating point: it changes its rows as it reads them (max_norm)",
        "hooked": "left in floating point: it has hooks",
    }


@pytest.mark.parametrize("magnitude", [1e-8, 1e-6, 1.0, 1e4])
def test_embeddings_and_checkpoints_keep_weights_of_any_size(magnitude: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(256, 32)
    plain = QuantEmbedding.from_embedding(embedding, 8).dequantize()
    expected = (plain - embedding.weight).square().sum() / embedding.weight.square().sum()
    model = nn.Sequential(embedding, nn.Linear(32, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= magnitude
    quantized, report = quantize(model, [torch.randint(256, (8, 8))], bits=8, group_size=32, embedding_bits=8)
    lost = (quantized[0].dequantize() - embedding.weight).square().sum() / embedding.weight.square().sum()
    torch.testing.assert_close(lost, expected, rtol=0.05, atol=0)
    assert quantized[0].scales.dtype == (torch.float32 if magnitude < 1e-4 else torch.float16)
    assert ("float32" in report[0].note) == (magnitude < 1)
    loaded = load(save(quantized, tmp_path / "model"), copy.deepcopy(model))
    ids = torch.randint(256, (2, 3))
    assert torch.equal(loaded(ids), quantized(ids))
    assert torch.equal(loaded.bfloat16()[1].dequantize(), quantized[1].dequantize())


def test_t5_which_looks_at_the_type_of_its_weights_compiles() -> None:
    model = t5()
    quantized, _ = quantize(model, None, group_size=32)
    block = quantized.encoder.block[0].layer[1].DenseReluDense
    assert isinstance(block.wo, QuantLinear)
    explained = torch._dynamo.explain(block)(torch.randn(2, 3, 32))
    assert explained.graph_break_count == 0
