"""The snippets of docs/early-exit.md run, one after the other."""

import re
from pathlib import Path
from typing import Any

import pytest

from lightning_distill.early_exit import EarlyExitModel

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "early-exit.md"


@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
# That an export runs, and answers as the model does, is shown by test_onnx.py.
@pytest.mark.parametrize("exports", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_snippet_runs(exports: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if exports:
        pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
        pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    else:
        monkeypatch.setattr(EarlyExitModel, "export_onnx", lambda model, folder: Path(folder).mkdir())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "guide"}
    for snippet in re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL):
        exec(compile(snippet, str(GUIDE), "exec"), names)
    assert "val_exit0_accuracy" in capsys.readouterr().out
    assert names["report"].guarantee["holds"]
    assert names["report"].mean_depth < 4
    assert names["logits"].shape == (8, 2)
    assert len(names["predictions"]) == 8
    assert (tmp_path / "early_exit" / "early_exit.png").exists()
    assert (tmp_path / "onnx").is_dir()
    assert (tmp_path / "onnx" / "early_exit_onnx.py").exists() is exports


def test_its_picture_is_there() -> None:
    for name in re.findall(r"!\[[^]]*\]\((.*?)\)", GUIDE.read_text()):
        assert (GUIDE.parent / name).read_bytes()[:4] == b"\x89PNG"
