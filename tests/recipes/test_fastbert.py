"""The recipe of early exit: what it adds to the summary, and that what it writes leaves early."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from lightning_distill.early_exit import EarlyExitModel
from tests.helpers.recipes import OF_A_FEW_ROWS, TRIAL, load_recipe, summary

pytestmark = [
    *OF_A_FEW_ROWS,
    pytest.mark.filterwarnings("ignore:Expected calibration data that can promise"),  # of a few rows, too
]
KEYS = {
    "metric_full",
    "metric_early",
    "metric_drop",
    "mean_depth",
    "throughput_ratio_batch1",
    "throughput_ratio_batch32",
    "guarantee",
}


def test_both_models_get_ramps_that_load(files: list[str], tmp_path: Path, capsys: Any) -> None:
    load_recipe("fastbert")([*files, "--model.max_drop=0.95", "--model.ramp_epochs=2"])
    found = summary(tmp_path)
    for name, depth in (("teacher", 4), ("student", 2)):
        row = found["early_exit" if name == "teacher" else "early_exit_student"]
        assert set(row) == KEYS
        assert row["guarantee"]["holds"]
        assert row["metric_drop"] == pytest.approx(row["metric_full"] - row["metric_early"])
        assert 1 <= row["mean_depth"] < depth
        assert row["metric_full"] == pytest.approx(found[name]["metric"])
        folder = tmp_path / "out" / f"early_exit_{name}"
        model = EarlyExitModel.from_pretrained(folder)
        assert model.depth == depth
        assert model.thresholds
        assert (folder / "early_exit.png").read_bytes()[:4] == b"\x89PNG"
        transformers.AutoTokenizer.from_pretrained(folder)
    assert "Early exit of the student" in capsys.readouterr().out
    # The row of the report is of the student without ramps.
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student")
    assert sum(parameter.numel() for parameter in plain.parameters()) == found["student"]["parameters"]


def test_embedded_default(tmp_path: Path) -> None:
    load_recipe("fastbert")([f"--output_dir={tmp_path / 'out'}", *TRIAL])
    assert set(summary(tmp_path)["early_exit"]) == KEYS


@pytest.mark.parametrize("flag", ["--model.exits=some", "--model.exits=every_4"])
def test_wrong_exits_are_one_line_before_the_first_step(
    files: list[str], tmp_path: Path, capsys: Any, flag: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        load_recipe("fastbert")([*files, flag])
    assert "`exits`" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
