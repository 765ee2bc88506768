"""Experts that transformers fuses: taken apart they answer the same, and are quantised one by one."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lightning_distill.quantization import QuantLinear, load, quantize, save
from lightning_distill.quantization.experts import LinearExperts, separate_experts

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL))


def qwen3_moe() -> nn.Module:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL))


def gpt_oss() -> nn.Module:
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SMALL))
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):  # zero as they come, which would hide a wrong one
            nn.init.normal_(parameter)
    return model


MODELS = [mixtral, qwen3_moe, gpt_oss]


def batches(count: int = 4, rows: int = 16) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(5, 300, (rows, 12))} for _ in range(count)]


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_taken_apart_they_answer_the_same(build) -> None:
    model, (batch,) = build(), batches(1)
    expected = logits(model, batch)
    assert separate_experts(model) == {}
    assert sum(isinstance(module, LinearExperts) for module in model.modules()) == 2
    torch.testing.assert_close(logits(model, batch), expected)


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_each_expert_is_quantised_saved_and_loaded(build, tmp_path: Path) -> None:
    model, data = build(), batches()
    quantized, report = quantize(model, data, group_size=32)
    rows = {layer.name: layer for layer in report}
    experts = [name for name in rows if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert not [module for module in model.modules() if isinstance(module, LinearExperts)]
    float_logits = logits(model, data[0])
    assert 0 < (logits(quantized, data[0]) - float_logits).norm() < 0.3 * float_logits.norm()
    solved = [rows[name] for name in experts if not rows[name].note]
    assert len(solved) >= 18  # the others saw too few tokens
    assert all(layer.error < layer.rounding_error for layer in solved)
    loaded = load(save(quantized, tmp_path / "model"))
    assert torch.equal(logits(loaded, data[0]), logits(quantized, data[0]))


def test_experts_with_too_few_tokens_are_rounded_and_that_is_said() -> None:
    model, data = mixtral(), batches(count=2, rows=1)  # 24 tokens, twice over 4 experts of width 32 and 64
    quantized, report = quantize(model, data, group_size=32, include=("experts",))
    notes = {layer.name: layer.note for layer in report}
    assert all("rounded to nearest" in note for note in notes.values())
    assert any("tokens reached it, 64 are needed" in note for note in notes.values())
    assert all(layer.error == layer.rounding_error for layer in report)
    assert isinstance(quantized.model.layers[1].mlp.experts[3].up_proj, QuantLinear)


def test_an_expert_that_the_first_batch_passes_by_is_calibrated_in_its_place() -> None:
    model = mixtral()
    data = batches(count=6, rows=1)  # few tokens a batch: some experts are first met in a later one
    met: list[str] = []
    quantize(model, data, group_size=32, on_layer=lambda report, total: met.append(report.name))
    blocks = [int(name.split(".")[2]) for name in met if "no calibration" not in name]
    assert blocks == sorted(blocks)


def test_asymmetric_where_the_float_model_sends_other_tokens_is_plain_and_that_is_said() -> None:
    model, data = mixtral(), batches(count=8)
    _, report = quantize(model, data, bits=2, group_size=32, asymmetric=True)
    notes = {layer.name: layer.note for layer in report}
    assert not any(note for name, note in notes.items() if "self_attn" in name)
    assert any("not asymmetric" in note for name, note in notes.items() if ".experts." in name)
    assert all(layer.error <= layer.rounding_error for layer in report)


def test_experts_in_a_layout_of_their_own_stay_and_that_is_said() -> None:
    model, data = mixtral(), batches()
    fused = model.model.layers[0].mlp.experts
    fused.has_post_expert_norm, fused.post_expert_norm = True, nn.Identity()
    _, report = quantize(model, data, group_size=32)
    notes = {layer.name: layer.note for layer in report}
    assert "end in a norm" in notes["model.layers.0.mlp.experts"]
    with pytest.raises(ValueError, match="end in a norm"):
        LinearExperts(fused)
