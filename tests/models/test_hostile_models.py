"""Model folders that are damaged, not whole, or made to do harm: one sentence each, and no memory."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distill.early_exit import EarlyExitModel, make_ramps
from lightning_distill.models.pretrained import load_pretrained, load_tokenizer
from lightning_distill.quantization import load, quantize, save
from tests.helpers.hostile import (
    CONFIGS,
    DEEP,
    TOKENIZERS,
    WEIGHT_FILES,
    change_bytes,
    change_config,
    change_json,
    change_tensors,
    cut,
    gone,
    hostile,
    void,
)
from tests.helpers.models import bert
from tests.helpers.text import write_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    words = len(write_tokenizer(folder))
    assert words == 80
    bert(vocab_size=words).save_pretrained(folder)
    load_tokenizer(folder, "teacher", load_pretrained(folder))
    return folder


@pytest.mark.parametrize("kind", [*WEIGHT_FILES, *CONFIGS])
def test_a_folder_that_is_no_whole_model_is_refused(
    kind: str, good: Path, tmp_path: Path, caplog: Any, capfd: Any
) -> None:
    folder = hostile(good, (WEIGHT_FILES | CONFIGS)[kind], tmp_path / "mine")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"Expected") as refused:
        load_pretrained(folder, "--model.teacher")
    said = str(refused.value)
    assert "\n" not in said
    assert "mine" in said
    assert len(said) < 800
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
    assert not [record for record in caplog.records if not record.name.startswith("bitsandbytes")]  # its own import
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_is_not_whole_is_refused(kind: str, good: Path, tmp_path: Path) -> None:
    folder = hostile(good, TOKENIZERS[kind], tmp_path / "mine")
    model = load_pretrained(folder)
    with pytest.raises(ValueError, match=r"Expected") as refused:
        load_tokenizer(folder, "--model.teacher", model)
    said = str(refused.value)
    assert "\n" not in said
    assert "mine" in said
    assert len(said) < 800


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ folder with ramps."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    model = bert(vocab_size=80, hidden_size=32, intermediate_size=64)
    model.ramps = make_ramps(model)
    return save(quantize(model, None, group_size=32)[0], folder)


LAYER = "bert.encoder.layer.0.output.dense"
GPTQ: dict[str, Callable[[Path], None]] = {
    **{kind: make for kind, make in CONFIGS.items() if "generation" not in kind and "quantised" not in kind},
    **{kind: make for kind, make in WEIGHT_FILES.items() if kind != "whole numbers"},
    "settings of a list": change_config(quantization_config=[1]),
    "another method": change_config(quantization_config={"quant_method": "awq"}),
    "no index of groups": change_tensors(lambda t: {k: v for k, v in t.items() if k != f"{LAYER}.g_idx"}),
    "no scales": change_tensors(lambda t: {k: v for k, v in t.items() if not k.endswith("scales")}),
    "groups beyond the scales": change_tensors(lambda t: {**t, f"{LAYER}.g_idx": t[f"{LAYER}.g_idx"] + 1000}),
    "groups below 0": change_tensors(lambda t: {**t, f"{LAYER}.g_idx": t[f"{LAYER}.g_idx"] - 9}),
    "fewer words": change_tensors(lambda t: {**t, f"{LAYER}.qweight": t[f"{LAYER}.qweight"][:3].clone()}),
    "words in floating point": change_tensors(lambda t: {**t, f"{LAYER}.qweight": t[f"{LAYER}.qweight"].float()}),
    "words in one row": change_tensors(lambda t: {**t, f"{LAYER}.qweight": t[f"{LAYER}.qweight"].flatten()}),
    "a layer that is none": change_tensors(
        lambda t: {**t, "bert.nowhere.qweight": torch.ones(4, 4, dtype=torch.int32)}
    ),
    "a norm in words": change_tensors(
        lambda t: {**t, "bert.embeddings.LayerNorm.qweight": torch.ones(4, 4, dtype=torch.int32)}
    ),
    "a class to import": change_config(class_path="os.system", init_args={"command": "true"}),
    "a class that is a number": change_config(class_path=3, init_args={}),
    "a class with arguments in a list": change_config(class_path="torch.nn.modules.linear.Linear", init_args=[1]),
    "a class of any size": change_config(
        class_path="torch.nn.modules.linear.Linear", init_args={"in_features": 10**9, "out_features": 10**9}
    ),
}
RAMPS: dict[str, Callable[[Path], None]] = {
    **{
        f"early_exit.json: {kind}": make
        for kind, make in {
            "cut": cut("early_exit.json", 0.5),
            "too deep": change_bytes("early_exit.json", DEEP),
            "a list": change_bytes("early_exit.json", b"[]"),
            "gone": gone("early_exit.json"),
            "no ramps": change_json("early_exit.json", ramps=None),
            "ramps of a list": change_json("early_exit.json", ramps=[1]),
            "10**9 ramps": change_json("early_exit.json", ramps={"exits": [0] * 10**6, "widths": [9] * 10**6}),
            "any width": change_json("early_exit.json", ramps={"exits": [0], "widths": [10**9], "num_outputs": 10**9}),
            "another criterion": change_json("early_exit.json", criterion={"name": "Mine"}),
            "a criterion that is a number": change_json("early_exit.json", criterion=3),
            "a criterion with other arguments": change_json(
                "early_exit.json", criterion={"name": "Entropy", "mine": 3}
            ),
            "thresholds of words": change_json("early_exit.json", thresholds={"0": "sure"}),
            "thresholds of names": change_json("early_exit.json", thresholds={"first": 0.5}),
            "thresholds of a layer that is none": change_json("early_exit.json", thresholds={"7": 0.5}),
            "thresholds of a list": change_json("early_exit.json", thresholds=[0.5]),
            "temperatures of a list": change_json("early_exit.json", temperatures=[0.5]),
        }.items()
    },
    "ramps that are cut": cut("ramps.safetensors", 0.5),
    "ramps that are empty": change_bytes("ramps.safetensors", b""),
    "ramps that are a pickle": change_bytes("ramps.safetensors", b"\x80\x04K\x01."),
    "no weights of ramps": gone("ramps.safetensors"),
    "weights of a student for ramps": lambda folder: void(
        (folder / "ramps.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    ),
}


@pytest.mark.parametrize("kind", GPTQ)
def test_a_gptq_folder_that_is_not_whole_is_refused(kind: str, packed: Path, tmp_path: Path) -> None:
    folder = hostile(packed, GPTQ[kind], tmp_path / "mine")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"mine|Expected `bert") as refused:
        load(folder)
    assert "\n" not in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.parametrize("kind", [*RAMPS, *(f"student: {kind}" for kind in ("no config", "a layer less"))])
def test_an_early_exit_folder_that_is_not_whole_is_refused(kind: str, packed: Path, tmp_path: Path) -> None:
    make = RAMPS.get(kind) or (WEIGHT_FILES | CONFIGS)[kind.removeprefix("student: ")]
    folder = hostile(packed, make, tmp_path / "mine")
    with pytest.raises((ValueError, TypeError)) as refused:
        EarlyExitModel.from_pretrained(folder)
    assert "\n" not in str(refused.value)
    assert "Expected" in str(refused.value)
