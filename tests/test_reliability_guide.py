"""The snippet of docs/reliability.md runs, and its tables name commands that exist."""

import re
from pathlib import Path
from typing import Any

import pytest

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_resumed_run_equals_the_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) == 1
    exec(compile(snippets[0], str(GUIDE), "exec"), {"__name__": "guide"})
    assert capsys.readouterr().out.strip().splitlines()[-1] == "True"


def test_every_file_that_it_names_is_there() -> None:
    root = GUIDE.parents[1]
    named = set(re.findall(r"(?:tests|benchmarks|recipes)/[\w/]+\.(?:py|json)", GUIDE.read_text()))
    assert len(named) > 5
    assert not [name for name in named if not (root / name).exists()]
