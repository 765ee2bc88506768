"""The recipes of two stages: what the first one learns, and that flags, errors and summary are those of the others."""

import csv
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.helpers.recipes import OF_A_FEW_ROWS, TRIAL, load_recipe, summary

pytestmark = OF_A_FEW_ROWS

STAGE_1 = {"tinybert": {"train_hidden_state", "train_attention_map"}, "minilm": {"train_attention_relation"}}


def losses(tmp_path: Path, phase: str) -> list[dict[str, str]]:
    with (tmp_path / "out" / "logs" / phase / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", STAGE_1)
def test_stage_1_learns_the_layers_and_stage_2_goes_on(
    name: str, files: list[str], tmp_path: Path, capsys: Any
) -> None:
    flags = [
        "--model.num_layers=2",
        "--model.width=0.5",
        "--model.stage_1_epochs=6",
        "--optimizer.lr=1e-2",
        "--trainer.log_every_n_steps=1",
    ]
    load_recipe(name)([*files, *flags, "--model.baseline=true"])
    found = summary(tmp_path)
    assert {
        "teacher",
        "student",
        "student_without_distillation",
        "ratios",
        "versions",
        "seed",
        "seconds",
        "tested",
    } == set(found)
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student")
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 8)

    rows = losses(tmp_path, "stage_1")
    assert STAGE_1[name] <= set(rows[0])
    validation = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert len(validation) == 6
    assert validation[-1] < 0.9 * validation[0]
    assert "train_hard_label" not in rows[0]
    assert "train_soft_target" in losses(tmp_path, "student")[0]
    assert "Training stage 1, for 6 epochs" in capsys.readouterr().out


@pytest.mark.parametrize("name", STAGE_1)
def test_embedded_default(name: str, tmp_path: Path) -> None:
    load_recipe(name)([f"--output_dir={tmp_path / 'out'}", *TRIAL])
    assert summary(tmp_path)["ratios"]["parameters"] < 1


def test_relation_heads_that_do_not_divide_are_one_line_before_the_first_step(
    files: list[str], tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        load_recipe("minilm")([*files, "--model.relation_heads=5"])
    assert "relation_heads" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
