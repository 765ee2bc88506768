"""The snippets of docs/language-models.md run, one after the other; its commands parse."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lightning_distill.cli import language_parser

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "language-models.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "guide"}
    for snippet in blocks("python"):
        exec(compile(snippet, str(GUIDE), "exec"), names)
    assert "train_on_policy" in names["trainer"].callback_metrics
    assert len(names["documents"]) == 8
    alone = names["generate"](names["teacher"], [names["prompts"][0]], max_new_tokens=32, do_sample=False)
    assert names["found"].sequences[0].tolist() == alone["input_ids"][0].tolist()


def test_commands_parse() -> None:
    parser = language_parser(None, output_dir="runs")
    commands = [shlex.split(line) for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    recipes = [command[2:] for command in commands if command[:2] == ["python", "recipes/causal_lm.py"]]
    assert len(recipes) >= 4
    for arguments in recipes:
        parser.parse_args(arguments)
