"""The stages of a model in onnxruntime give what the model gives."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_distill.early_exit import EarlyExitModel, Patience, make_ramps
from tests.early_exit.models import Stack, early, student
from tests.helpers.models import tokens

pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")


def load_driver(folder: Path) -> Any:
    """The driver as a user has it: a file beside the graphs."""
    names: dict[str, Any] = {"__name__": "early_exit_onnx"}
    exec(compile((folder / "early_exit_onnx.py").read_text(), "early_exit_onnx.py", "exec"), names)
    return names["EarlyExit"]


def test_onnxruntime_answers_as_the_model_does(tmp_path: Path) -> None:
    model = early(student(num_labels=3, num_hidden_layers=2))
    model.temperatures = {0: 0.9}
    model.export_onnx(tmp_path)
    driver = load_driver(tmp_path)(tmp_path)
    exits_seen = set()
    for rows, length in ((32, 10), (1, 7), (5, 13)):
        batch = tokens(rows, length, seed=rows)
        expected = model.predict(batch)
        logits, exits = driver.predict({key: value.numpy() for key, value in batch.items()})
        assert exits.tolist() == expected.exit_layer.tolist()
        np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=1e-4, atol=1e-5)
        exits_seen |= set(exits.tolist())
    assert exits_seen == {0, 1}
    # The second stage has neither the embeddings nor the first layers.
    import onnx

    weights = [
        sum(int(np.prod(tensor.dims)) for tensor in onnx.load(tmp_path / f"stage{index}.onnx").graph.initializer)
        for index in range(2)
    ]
    total = sum(parameter.numel() for parameter in model.student.parameters())
    assert sum(weights) < 1.1 * total
    assert "torch" not in (tmp_path / "early_exit_onnx.py").read_text()
    driver.exits[0] = (0, 1.0)  # a threshold can be changed
    assert set(driver.predict({key: value.numpy() for key, value in tokens(8, 8).items()})[1].tolist()) == {1}
    assert json.loads((tmp_path / "onnx.json").read_text())["inputs"] == ["input_ids", "attention_mask"]


def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = student()
    patient = EarlyExitModel(net, make_ramps(net, criterion=Patience(1)))
    with pytest.raises(ValueError, match="remembers nothing, such as Confidence"):
        patient.export_onnx(tmp_path)
    with pytest.raises(ValueError, match="a transformers model"):
        early(Stack(), layers="body").export_onnx(tmp_path, {"x": torch.randn(2, 8)})
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-distill\[onnx\]'"):
        early(student()).export_onnx(tmp_path)
