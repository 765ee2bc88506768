"""What a run says in the end of numbers that mean little: zeros, NaN, one class, one row, a part of the test rows."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lightning_distill.cli import report
from lightning_distill.cli.evidence import (
    ItemCount,
    OneAnswer,
    Outcome,
    difference_interval,
    remarks,
    wilson_interval,
)
from tests.helpers.models import bert
from tests.helpers.recipes import OF_A_FEW_ROWS, load_recipe, refusal, summary

pytestmark = [*OF_A_FEW_ROWS, pytest.mark.filterwarnings("ignore:Expected calibration data that can promise")]


def teacher_that_says(answer: int, tmp_path: Path) -> None:
    """Make the fixture's teacher one of a single class."""
    folder = tmp_path / "teacher"
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.nn.functional.one_hot(torch.tensor(answer), 2) * 9.0)
    model.save_pretrained(folder)


def test_a_teacher_of_metric_0_and_a_report_that_failed(
    files: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher_that_says(1, tmp_path)
    (tmp_path / "test.tsv").write_text("sentence\tlabel\n" + "a cold film\t0\n" * 9)
    main = load_recipe("distilbert")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the picture")

    with monkeypatch.context() as broken:
        broken.setattr(report, "plot_curves", fail)
        with pytest.raises(OSError, match="the picture"):
            main(files)
    main([*files, "--resume"])
    found, said = summary(tmp_path), capsys.readouterr().out
    assert "Resuming student" in said
    assert found["teacher"]["metric"] == 0.0
    assert found["ratios"]["metric_retained"] is None
    assert found["tested"]["one_answer"][0] == "teacher"
    assert found["tested"]["intervals"]["teacher"] == pytest.approx([0.0, 0.2991], abs=1e-4)
    assert re.search(r"student / teacher .* -  ?│ +-", said), said
    assert "The teacher gives one answer to all 9 test rows: its accuracy of 0.0000 says nothing" in said


@pytest.mark.filterwarnings("ignore:The variance of predictions or target is close to zero")
@pytest.mark.parametrize("scores", [["0.5"] * 8, ["0.5"]])
def test_a_regression_without_a_correlation(
    scores: list[str], files: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "teacher").vocab_size
    bert(layers=4, vocab_size=words, max_position_embeddings=64, num_labels=1).save_pretrained(tmp_path / "teacher")
    for name, values in (("train", ["0.1", "0.9"] * 6), ("val", ["0.1", "0.9"]), ("test", scores)):
        rows = [f"film number {index}\t{value}" for index, value in enumerate(values)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    load_recipe("distilbert")([*files, "--data.task=regression"])
    found = summary(tmp_path)
    assert found["student"]["metric"] is None
    assert found["ratios"]["metric_retained"] is None
    assert found["tested"]["intervals"]["student"] is None
    assert "pearson (test)" in capsys.readouterr().out


def test_early_exit_needs_two_classes_to_choose_thresholds_and_says_so_first(
    files: list[str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "val.tsv").write_text("sentence\tlabel\n" + "a cold film\t0\n" * 4)
    assert "--data.val_file: thresholds are chosen on validation rows of at least two" in refusal(
        load_recipe("fastbert"), files, capsys
    )
    assert not (tmp_path / "out").exists()


def test_a_part_of_the_test_rows(files: list[str], tmp_path: Path, capsys: Any) -> None:
    load_recipe("distilbert")([*files, "--trainer.limit_test_batches=2"])
    found = summary(tmp_path)["tested"]
    assert (found["items"], found["available"]) == (16, 24)
    assert "16 of 24 test rows, seed 0" in capsys.readouterr().out


def test_the_first_metric_by_name_decides(files: list[str], tmp_path: Path, capsys: Any) -> None:
    load_recipe("distilbert")([*files, "--metric=macro_f1,accuracy", "--gptq.bits=8", "--gptq.group_size=-1"])
    found = summary(tmp_path)
    assert found["student"]["metric_name"] == "macro_f1"
    assert 0 <= found["gptq"]["metric"] <= 1
    assert "macro_f1 (test)" in capsys.readouterr().out
    logged = (tmp_path / "out" / "logs" / "student" / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert {"val_macro_f1", "val_accuracy"} <= set(logged)


def test_a_metric_that_there_is_not_is_said_before_anything_is_written(
    files: list[str], tmp_path: Path, capsys: Any
) -> None:
    said = refusal(load_recipe("distilbert"), [*files, "--metric=macro_f"], capsys)
    assert "`metric` to be of accuracy, " in said
    assert "Did you mean 'macro_f1'?" in said
    said = refusal(load_recipe("fastbert"), [*files, "--metric=macro_f1"], capsys)
    assert "--metric: what early exit costs" in said
    assert not (tmp_path / "out").exists()


def test_intervals_against_their_sources() -> None:
    # Newcombe 1998, "Interval estimation for the difference", table II, cases (a) and (b): 56/70 - 48/80 is of unequal
    # sizes, so only its ends of Wilson are here.
    assert wilson_interval(56 / 70, 70) == pytest.approx((0.6921, 0.8774), abs=5e-4)
    from scipy.stats import binomtest

    for hits, count in ((0, 9), (1, 1), (245, 490), (489, 490)):
        expected = binomtest(hits, count).proportion_ci(0.95, "wilson")
        assert wilson_interval(hits / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = difference_interval(9 / 10, 3 / 10, 10)  # the same table, case (c)
    assert (low, high) == pytest.approx((0.1705, 0.8090), abs=5e-4)


def test_what_is_said_under_a_table() -> None:
    sure = {"student": Outcome(1000, interval=(0, 1)), "teacher": Outcome(1000, interval=(0, 1))}
    assert remarks(sure, {"student": 0.8, "teacher": 0.9}, "accuracy") == []
    (said,) = remarks(sure, {"student": 0.9, "teacher": 0.91}, "accuracy")
    assert said.startswith("1000 test rows cannot tell the accuracy of the student from that of the teacher")
    assert "the difference is -0.0100, somewhere from -0.0" in said
    constant = {"student": Outcome(1043, one_answer=True, interval=(0, 1)), "teacher": Outcome(1043, interval=(0, 1))}
    (said,) = remarks(constant, {"student": 0.691, "teacher": 0.682}, "accuracy")
    assert said.startswith("The student gives one answer to all 1043 test rows")
    assert (
        remarks({"student": Outcome(9), "teacher": Outcome(9)}, {"student": math.nan, "teacher": 0.0}, "pearson") == []
    )


@pytest.mark.parametrize(
    ("batches", "same"),
    [
        ([([[0.1, 0.9]], [0]), ([[0.2, 0.3]], [1])], True),
        ([([[0.1, 0.9]], [0]), ([[0.4, 0.3]], [1])], False),
        ([([[math.nan, math.nan]] * 2, [0, 1])], True),
        ([([0.5, 0.5], [0.1, 0.2])], True),
        ([([0.5, 0.6], [0.1, 0.2])], False),
        ([([-3.0, -2.0], [0, 1])], True),
        ([([0.4, 0.6], [0, 1])], False),
        ([([[3.0, -2.0], [1.0, -1.0]], [[0, 1], [1, 0]])], True),
        ([([[3.0, -2.0], [1.0, 1.0]], [[0, 1], [1, 0]])], False),
    ],
)
def test_one_answer_and_counts(batches: Any, same: bool) -> None:
    one, items = OneAnswer(), ItemCount()
    for logits, labels in batches:
        one.update(torch.tensor(logits), torch.tensor(labels))
        items.update(torch.tensor(logits), torch.tensor(labels))
    assert bool(one.compute()) is same
    assert int(items.compute()) == sum(torch.tensor(labels).numel() for _, labels in batches)


@pytest.mark.parametrize("values", [[math.nan] * 3, [math.inf, 1.0], [-math.inf], [1e308, -1e308], [3e38], []])
def test_pictures_of_any_numbers(values: list[float], tmp_path: Path) -> None:
    curves = {"run": {"loss": (list(range(len(values))), values)}}
    lines = {"loss": {"low": math.nan, "high": math.inf, "large": 1e308}}
    report.plot_curves(tmp_path / "curves.png", curves, panels={"loss": ["loss"]}, lines=lines)
    assert (tmp_path / "curves.png").stat().st_size


@pytest.mark.parametrize("teacher", [0.0, -0.3, math.nan, math.inf, None])
def test_tables_and_summaries_of_any_numbers(teacher: float | None, tmp_path: Path, capsys: Any) -> None:
    columns = [report.Column("score", "metric", "{:.2f}", name="kept"), report.Column("same", "agreement", "{}")]
    rows = {"teacher": {"metric": teacher, "agreement": 1.0}, "student": {"metric": 0.5, "agreement": math.nan}}
    report.print_table(rows, columns, reference="teacher", title="any")
    assert re.search(r"student / teacher │ +- │ +- │", capsys.readouterr().out)
    report.write_summary(
        tmp_path / "summary.json", rows | {"ratios": report.ratios(rows["student"], rows["teacher"], columns)}
    )
    assert "NaN" not in (tmp_path / "summary.json").read_text()
    assert '"kept": null' in (tmp_path / "summary.json").read_text()
