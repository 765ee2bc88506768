import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import lightning as L
import pytest
import torch
import transformers
from torch import nn

from lightning_distill.quantization import (
    LayerReport,
    QuantEmbedding,
    QuantLinear,
    load,
    most_sensitive,
    quantize,
    save,
    sensitivity,
)
from lightning_distill.quantization.calibration import calibrate, first_batches
from lightning_distill.quantization.mixed import layer_bytes

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {"vocab_size": 300, "max_position_embeddings": 64}


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **TEXT))


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **TEXT)
    return transformers.DistilBertForSequenceClassification(config)


def roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, **TEXT))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **TEXT))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300))


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=300, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=300, max_position_embeddings=64,
        forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4))


MODELS = [bert, distilbert, roberta, llama, gpt2, t5, bart, vit]


def batches(model: nn.Module, count: int = 4) -> list:
    if isinstance(model, transformers.ViTForImageClassification):
        return [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(count)]
    result = []
    for _ in range(count):
        batch = {"input_ids": torch.randint(5, 300, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
        batch["attention_mask"][1, 8:] = 0
        if model.config.is_encoder_decoder:
            batch["labels"] = torch.randint(5, 300, (4, 7))
        result.append(batch)
    return result


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_every_architecture_is_quantised_saved_and_loaded(build, tmp_path: Path) -> None:
    model = build()
    data = batches(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized, report = quantize(model, data, group_size=32, embedding_bits=None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {layer.name for layer in report} == {
        name for name, module in quantized.named_modules() if isinstance(module, QuantLinear)
    }
    assert len(report) >= 8
    assert sum(layer.error for layer in report) < sum(layer.rounding_error for layer in report)
    assert not any(layer.note for layer in report)
    float_logits = logits(model, data[0])
    assert 0 < (logits(quantized, data[0]) - float_logits).norm() < 0.25 * float_logits.norm()

    loaded = load(save(quantized, tmp_path / "model"))
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, data[0]), logits(quantized, data[0]))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in quantized.state_dict().items())
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "model" / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, True, False)
    assert config["block_name_to_quantize"] in report[0].name


def test_layers_see_what_a_plain_forward_gives_them_without_padding() -> None:
    model = bert().eval()
    data = batches(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected: dict[str, list] = {name: [] for name in layers}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: expected[name].append(args[0]))
        for name, module in layers.items()
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    groups = []
    for names, inputs in calibrate(model, layers, data):
        groups.append(names)
        for name in names:
            for batch, mine, theirs in zip(data, inputs, expected[name], strict=True):
                rows = theirs.flatten(0, -2)
                if rows.shape[0] == batch["attention_mask"].numel():
                    rows = rows[batch["attention_mask"].flatten().bool()]
                torch.testing.assert_close(mine, rows)
    prefix = "bert.encoder.layer.0.attention.self."
    assert groups[0] == [prefix + "query", prefix + "key", prefix + "value"]
    assert [name for group in groups for name in group] == list(layers)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_later_layers_are_calibrated_on_quantised_ones() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    data = [torch.randn(64, 32) for _ in range(3)]
    quantized, report = quantize(model, data, bits=2, group_size=32, asymmetric=False)
    weight = model[2].weight.detach()
    hidden = torch.relu(quantized[0](torch.cat(data))).detach()
    left = (hidden @ (weight - quantized[2].dequantize()).T).square().sum()
    power = (hidden @ weight.T).square().sum()
    assert report[1].error == pytest.approx(float(left / power), rel=1e-3)


def test_without_true_sequential_layers_are_calibrated_on_the_float_model() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    data = [torch.randn(64, 32) for _ in range(3)]
    quantized, report = quantize(model, data, bits=2, group_size=32, true_sequential=False)
    weight = model[2].weight.detach()
    hidden = torch.relu(model[0](torch.cat(data))).detach()
    left = (hidden @ (weight - quantized[2].dequantize()).T).square().sum()
    assert report[1].error == pytest.approx(float(left / (hidden @ weight.T).square().sum()), rel=1e-3)


@pytest.mark.parametrize("build", [bert, t5], ids=lambda build: build.__name__)
def test_asymmetric_calibration_comes_nearer_to_the_float_model(build) -> None:
    model = build()
    data = batches(model, 16)

    def distance(**options) -> float:
        quantized, report = quantize(model, data, bits=3, group_size=32, **options)
        assert not any(layer.note for layer in report)
        return sum(float((logits(quantized, batch) - logits(model, batch)).square().sum()) for batch in data)

    assert distance(asymmetric=True) < distance(asymmetric=False)


def test_two_bits_are_asymmetric_by_themselves() -> None:
    model = bert()
    data = batches(model, 16)

    def answer(bits: int, **options) -> torch.Tensor:
        return logits(quantize(model, data, bits=bits, group_size=32, **options)[0], data[0])

    assert torch.equal(answer(2), answer(2, asymmetric=True))
    assert not torch.equal(answer(2), answer(2, asymmetric=False))
    assert torch.equal(answer(3), answer(3, asymmetric=False))


def test_a_plain_lightning_module_that_has_been_fitted() -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.layer(inputs)

    module = Module()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    quantized, _ = quantize(module, [torch.randn(64, 32)], group_size=32)
    assert isinstance(quantized.layer, QuantLinear)


def test_sensitivity_leaves_the_model_alone_and_finds_the_coarse_layer() -> None:
    model = bert().train()
    data = batches(model)
    coarse = "bert.encoder.layer.1.output.dense"
    quantized, report = quantize(model, data, group_size=32, bits_by_pattern={coarse: 2})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changes = sensitivity(model, quantized, data)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert changes.keys() == {layer.name for layer in report}
    assert max(changes, key=changes.__getitem__) == coarse
    assert most_sensitive(report, changes, count=1) == [coarse]
    assert most_sensitive(report, changes, budget_bytes=1) == []


def test_bytes_of_a_layer_are_those_of_its_tensors() -> None:
    model = bert()
    quantized, report = quantize(model, batches(model), group_size=32, bits_by_pattern={"query": 8, "key": 2})
    for row in report:
        layer = quantized.get_submodule(row.name)
        tensors = (layer.qweight, layer.qzeros, layer.scales, layer.g_idx)
        assert layer_bytes(row, row.bits) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_patterns_bits_group_sizes_and_embeddings() -> None:
    model = bert()
    quantized, report = quantize(
        model,
        batches(model),
        embedding_bits=8,
        exclude=("classifier", "pooler", "*.layer.1.output.dense"),
        bits_by_pattern={"query": 8, "key": 0},
        group_size_by_pattern={"intermediate*": 32},
    )
    rows = {layer.name.removeprefix("bert.encoder.layer."): layer for layer in report}
    assert rows["0.attention.self.query"].bits == 8
    assert rows["0.attention.self.key"].bits == 0
    assert "asked for" in rows["0.attention.self.key"].note
    assert "does not divide" in rows["0.attention.self.value"].note
    assert rows["0.output.dense"].group_size == 64
    assert "1.output.dense" not in rows
    assert isinstance(quantized.bert.embeddings.word_embeddings, QuantEmbedding)
    assert isinstance(quantized.bert.embeddings.position_embeddings, nn.Embedding)
    assert isinstance(quantized.classifier, nn.Linear)


def test_mixed_bits_and_embeddings_survive_the_folder(tmp_path: Path) -> None:
    model = bert()
    data = batches(model)
    quantized, _ = quantize(model, data, embedding_bits=4, bits_by_pattern={"query": 8}, sym=False, static_groups=False)
    loaded = load(save(quantized, tmp_path / "model"))
    assert torch.equal(logits(loaded, data[0]), logits(quantized, data[0]))


def test_tied_layers_are_quantised_once_and_keep_their_biases(tmp_path: Path) -> None:
    class Tied(nn.Sequential):
        def __init__(self, bias: bool) -> None:
            super().__init__(nn.Linear(32, 32, bias=bias), nn.Linear(32, 32, bias=bias))
            self[1].weight = self[0].weight

    for bias in (False, True):
        model = Tied(bias)
        quantized, report = quantize(model, [torch.randn(64, 32)], bits=8, group_size=32)
        assert len(report) == 1
        assert quantized[0].qweight is quantized[1].qweight
        assert (quantized[0] is quantized[1]) is not bias
        inputs = torch.randn(64, 32)
        torch.testing.assert_close(quantized(inputs), model(inputs), atol=0.02, rtol=0)
        loaded = load(save(quantized, tmp_path / str(bias)), Tied(bias))
        assert torch.equal(loaded(inputs), quantized(inputs))


def test_an_interrupted_run_goes_on_and_gives_the_same_model(tmp_path: Path) -> None:
    model = bert()
    data = batches(model)
    whole, _ = quantize(model, data, group_size=32)
    count = 0

    def die(report: LayerReport, total: int) -> None:
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, data, group_size=32, resume=tmp_path, on_layer=die)
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(finished) == 7
    resumed, report = quantize(model, data, group_size=32, resume=tmp_path)
    assert all((tmp_path / name).stat().st_mtime_ns == stamp for name, stamp in finished.items())
    assert len(report) == 12
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight += 1  # another model: nothing of the old one counts
    other, _ = quantize(model, data, group_size=32, resume=tmp_path)
    afresh, _ = quantize(model, data, group_size=32)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in afresh.state_dict().items())
    other, _ = quantize(model, data, group_size=32, bits=8, resume=tmp_path)
    assert other.bert.encoder.layer[0].attention.self.query.bits == 8


def test_rounding_from_the_same_path() -> None:
    model = bert()
    _, report = quantize(model, None, group_size=32)
    assert all(layer.error == layer.rounding_error for layer in report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "`bits`"),
        ({"group_size": 48}, "`group_size`"),
        ({"embedding_bits": 3}, "`embedding_bits`"),
        ({"num_samples": 0}, "`num_samples`"),
        ({"asymmetric": True, "dataloader": None}, "`asymmetric`"),
        ({"asymmetric": True, "true_sequential": False}, "`asymmetric`"),
        ({"include": ("nothing",)}, "none is left"),
        ({"dataloader": []}, "gave none"),
        ({"dataloader": [torch.full((64, 32), math.nan)]}, "layer `0`"),
        ({"model": nn.Sequential(nn.Linear(30, 30))}, "none is left"),
    ],
    ids=str,
)
def test_bad_input_leaves_the_model_alone(change: dict, message: str) -> None:
    model = change.get("model") or nn.Sequential(nn.Linear(32, 32))
    before = model[0].weight.clone()
    arguments = {"dataloader": [torch.randn(64, 32)], **change, "model": model}
    with pytest.raises(ValueError, match=message):
        quantize(**arguments)
    assert torch.equal(model[0].weight, before)


def test_too_few_samples_are_said_with_the_rank() -> None:
    with pytest.warns(UserWarning, match="0: 5 of 32"):
        quantize(nn.Sequential(nn.Linear(32, 32)), [torch.randn(5, 32)], group_size=32)


def test_a_quantised_model_and_another_format_are_refused(tmp_path: Path, monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    quantized, _ = quantize(model, [torch.randn(64, 32)], group_size=32)
    with pytest.raises(ValueError, match="already"):
        quantize(quantized, [torch.randn(64, 32)])
    with pytest.raises(ValueError, match="quantised layers"):
        save(model, tmp_path / "float")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(ValueError, match="awq"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"readable config.json"):
        load(tmp_path / "absent")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match="10 are free"):
        save(quantized, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_plain_module_loads_into_a_model_given(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    quantized, _ = quantize(model, [torch.randn(64, 32)], group_size=32)
    loaded = load(save(quantized, tmp_path / "plain"), nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))
    inputs = torch.randn(3, 32)
    assert torch.equal(loaded(inputs), quantized(inputs))


class Row(NamedTuple):
    """A batch as some data sets give it."""

    inputs: torch.Tensor
    labels: torch.Tensor


def test_named_tuples_calibrate_as_tuples_do() -> None:
    torch.manual_seed(0)
    pair = torch.randn(6, 32), torch.arange(6) % 2
    one, other = (first_batches([batch, batch], 9, torch.device("cpu")) for batch in (pair, Row(*pair)))
    assert [type(batch) for batch in other] == [Row, Row]
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert [len(batch.labels) for batch in other] == [6, 3]
