"""The snippets of docs/quantization.md run, one after the other."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_distill.quantization import QuantEmbedding, QuantLinear

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "quantization.md"
*SNIPPETS, INT8 = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)

# The guide's few rows are fewer than a layer has inputs, and its trainer logs and stores where it runs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Expected at least as many calibration tokens"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "guide"}
    for snippet in SNIPPETS:
        exec(compile(snippet, str(GUIDE), "exec"), names)
    return names


def test_every_snippet_runs(names: dict[str, Any]) -> None:
    assert {"bits", "metric", "metric_before", "bytes"} <= names["gptq"].summary.keys()
    assert Path("student-gptq/gptq.png").exists()
    loaded = load_first(names["load"]("student-gptq"))
    assert [type(module) for module in loaded] == [QuantEmbedding, QuantLinear]
    assert {layer.bits for layer in names["report"]} == {3, 4, 8}


def load_first(model: Any) -> list[Any]:
    return [model.bert.embeddings.word_embeddings, model.bert.encoder.layer[0].output.dense]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torchao", "bitsandbytes", "onnxscript", "onnxruntime")),
    reason="needs the extras `int8`, `bitsandbytes` and `onnx`",
)
def test_int8_snippet_runs(names: dict[str, Any]) -> None:
    exec(compile(INT8, str(GUIDE), "exec"), names)
    assert Path("student.onnx").stat().st_size > 0
    for model in ("fast", "teacher_in_8bit", "teacher_in_nf4"):
        assert names[model](**names["inputs"]).logits.shape == (16, 2)
