"""The guide to the Trainer's flags is true: its tests exist, snippets run, the command parses, figures are measured."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import torch

from lightning_distill.cli import text_parser

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "trainer-flags.md").read_text()


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", GUIDE)
    assert len(named) > 15
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


def test_every_cell_of_the_table_has_a_letter_that_is_explained() -> None:
    rows = GUIDE.split("<!-- table -->")[1].split("\n\n")[0].strip().splitlines()[2:]
    explained = set(re.findall(r"^- ([A-Z]): ", GUIDE, re.MULTILINE))
    used = set()
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 7
        for cell in cells[1:]:
            letters = set(re.findall(r"\b([A-Z])\b", cell))
            assert letters or cell == "GPU, not run"
            used |= letters
    assert used == explained


def test_snippets_run() -> None:
    names: dict[str, Any] = {"__name__": "guide"}
    for snippet in re.findall(r"^```python\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL):
        exec(compile(snippet, "trainer-flags.md", "exec"), names)
    assert names["student"].dtype == torch.bfloat16
    assert names["teacher"].dtype == torch.float32
    assert names["module"].teacher.classifier.weight.dtype == torch.float32
    assert names["by_plan"]._tensor_parallel_size == 2


def test_the_command_parses() -> None:
    (block,) = re.findall(r"^```bash\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)
    words = shlex.split(block.replace("\\\n", " "))
    config = text_parser(None, output_dir="runs").parse_args(words[words.index("recipes/distilbert.py") + 1 :])
    assert (config.trainer.strategy, config.trainer.num_nodes) == ("ddp", 2)


def test_the_table_of_memory_is_that_of_the_last_run() -> None:
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    measured = memory.json.loads(memory.RESULTS.read_text())
    assert [row["name"] for row in measured["rows"]] == [setting.name for setting in memory.SETTINGS]
    assert memory.table(measured) in GUIDE
