"""The common format, with optimum and gptqmodel at the other end, through plain transformers."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lightning_distill.quantization import QuantLinear, load, quantize, save
from tests.helpers.text import sentiment, write_tokenizer
from tests.quantization.test_model import batches, bert, distilbert, gpt2, llama, logits

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None,
        reason="needs the extra `gptq`: pip install 'lightning-distill[gptq]'",
    ),
    # What gptqmodel and optimum do on import and on loading.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
# It starts one thread a core and 14 more otherwise.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
# And compiles, for a minute on a new machine, what it also has in Python: packing, into the same format.
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, vocab_size=300,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def plain(model: nn.Module, folder: Path, bits: int = 4, backend: str | None = "torch") -> nn.Module:
    """Load by transformers alone; the backend is gptqmodel's exact one unless it is to choose its own."""
    config = {} if backend is None else {"quantization_config": transformers.GPTQConfig(bits=bits, backend=backend)}
    return type(model).from_pretrained(folder, dtype=torch.float32, device_map="cpu", **config)


def near(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    # Their weights are scale times code in float16, ours in float32.
    assert (theirs - ours).abs().max() < 5e-4 * ours.abs().max()


@pytest.mark.parametrize("build", [bert, distilbert, llama, opt], ids=lambda build: build.__name__)
def test_plain_from_pretrained_gives_the_same_logits(build, tmp_path: Path) -> None:
    model = build()
    data = batches(model)
    quantized, _ = quantize(model, data, group_size=32)
    loaded = plain(model, save(quantized, tmp_path / "model"))
    ours, theirs = logits(quantized, data[0]), logits(loaded, data[0])
    layers = [name for name, module in quantized.named_modules() if isinstance(module, QuantLinear)]
    assert all(hasattr(loaded.get_submodule(name), "qweight") for name in layers)
    near(theirs, ours)


@pytest.mark.parametrize(
    ("bits", "options"),
    [(2, {}), (3, {}), (8, {}), (4, {"sym": False}), (4, {"static_groups": False}), (4, {"group_size": -1})],
    ids=str,
)
def test_bits_and_options_come_through(bits: int, options: dict, tmp_path: Path) -> None:
    model = llama()
    data = batches(model)
    quantized, _ = quantize(model, data, bits=bits, **{"group_size": 32, **options})
    loaded = plain(model, save(quantized, tmp_path / "model"), bits)
    near(logits(loaded, data[0]), logits(quantized, data[0]))


def test_the_kernel_that_it_chooses_by_itself_is_as_near_as_bfloat16(tmp_path: Path) -> None:
    model = bert()
    data = batches(model)
    quantized, _ = quantize(model, data, group_size=32)
    loaded = plain(model, save(quantized, tmp_path / "model"), backend=None)
    ours = logits(quantized, data[0])
    assert (logits(loaded, data[0]) - ours).norm() < 0.02 * ours.norm()


def test_gpt2_is_loaded_by_us_where_transformers_cannot(tmp_path: Path) -> None:
    model = gpt2()
    data = batches(model)
    quantized, _ = quantize(model, data, group_size=32)
    folder = save(quantized, tmp_path / "model")
    assert torch.equal(logits(load(folder), data[0]), logits(quantized, data[0]))


@pytest.mark.parametrize("sym", [True, False])
def test_we_load_what_gptqmodel_wrote(sym: bool, tmp_path: Path) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    tokenizer = write_tokenizer(tmp_path / "float")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    rows = [dict(tokenizer(text)) for text, _ in sentiment(40)]
    rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
    settings = QuantizeConfig(bits=4, group_size=32, desc_act=False, sym=sym, offload_to_disk=False)
    model = GPTQModel.load(str(tmp_path / "float"), settings, device="cpu", dtype=torch.float32)
    model.quantize(rows, batch_size=8, tokenizer=tokenizer)
    model.save(str(tmp_path / "theirs"))

    ours = load(tmp_path / "theirs")
    layers = [module for module in ours.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 7
    assert all(layer.bits == 4 and layer.group_size == 32 for layer in layers)
    batch = {"input_ids": torch.tensor([rows[0]["input_ids"]])}
    theirs = plain(ours, tmp_path / "theirs")
    near(logits(theirs, batch), logits(ours, batch))
    # And once more through our own folder.
    again = load(save(ours, tmp_path / "ours"))
    assert torch.equal(logits(again, batch), logits(ours, batch))
    assert json.loads((tmp_path / "ours" / "quantize_config.json").read_text())["sym"] is sym
