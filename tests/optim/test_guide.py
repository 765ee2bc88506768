"""The snippets of docs/optimization.md run, one after the other."""

import re
from pathlib import Path
from typing import Any

import pytest

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "optimization.md"


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "guide"}
    for snippet in snippets:
        exec(compile(snippet, str(GUIDE), "exec"), names)
    assert names["optimizer"].param_groups[0]["momentum"] == 0.9
    assert names["low"] == 1e-3
    trainer = names["L"].Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(names["Model"]())
    assert trainer.lr_scheduler_configs[0].interval == "step"
