"""README is true: its Python runs, its YAML trains through Lightning's own CLI, its commands parse."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_distill import DistillationModule
from lightning_distill.cli import text_parser
from tests.helpers.models import bert
from tests.helpers.text import write_sentiment, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

# README's examples train without validation and in a folder of their own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", [code for code in blocks("python") if "LightningCLI" not in code])
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    if "objectives" in names:
        assert sum(objective.weight for objective in names["objectives"]) == pytest.approx(1.0)
    else:
        small, large = (sum(p.numel() for p in names[model].parameters()) for model in ("student", "teacher"))
        assert small < large


def test_the_subclass_is_fifteen_lines() -> None:
    (code,) = [code for code in blocks("python") if "class MyDistillation" in code]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


# Lightning's own CLI, not this package, still calls what jsonargparse has renamed.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_yaml_trains_through_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "path" / "to" / "teacher"
    tokenizer = write_tokenizer(folder)
    bert(layers=4, vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(folder)
    for name in ("train.tsv", "dev.tsv"):
        write_sentiment(tmp_path / name)
    (tmp_path / "distill.yaml").write_text(blocks("yaml")[0])
    flags = [f"--trainer.{flag}=false" for flag in ("logger", "enable_progress_bar", "enable_model_summary")]
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LightningCLI(
        DistillationModule,
        args=["fit", "--config", "distill.yaml", "--seed_everything=0", "--trainer.accelerator=cpu", *flags],
    )
    assert cli.model.student.config.num_hidden_layers == 3
    assert cli.model.objectives["soft_target"].temperature == 4.0
    assert "val_agreement" in cli.trainer.callback_metrics


def test_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in blocks("yaml"):
        Path(code.splitlines()[0].removeprefix("# ")).write_text(code)
    parser = text_parser(None, output_dir="runs")
    lines = "\n".join(code.replace("\\\n", " ") for code in blocks("bash")).splitlines()
    commands = [shlex.split(line) for line in lines]
    recipes = [
        command[command.index("recipes/distilbert.py") + 1 :]
        for command in commands
        if command[1:2] == ["recipes/distilbert.py"]
    ]
    assert len(recipes) == 3
    for arguments in recipes:
        parser.parse_args(arguments)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_no_table_is_cut(page: Path) -> None:
    lines = page.read_text().splitlines()
    for index, line in enumerate(lines):
        begins = line.startswith("|") and not lines[index - 1].startswith("|")
        assert not begins or lines[index + 1].startswith("|--"), f"{page.name}:{index + 1} belongs to no table"
