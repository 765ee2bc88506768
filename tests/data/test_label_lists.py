"""Several labels a row: a field with a separator, or lists; names or ids; and what is wrong, in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.preprocessing import MultiLabelBinarizer

from lightning_distill.data import TextClassificationData, train_tokenizer
from lightning_distill.objectives import HardLabel

GOEMOTIONS = Path(__file__).parents[3] / "shared" / "data" / "goemotions"
FIELDS = ["joy,love", "", "anger", "love, joy", "anger,joy", "love"] * 3
LISTS = [[part.strip() for part in field.split(",") if part] for field in FIELDS]
IDS = [[["anger", "joy", "love"].index(name) for name in row] for row in LISTS]
TEXTS = [f"good {i}" for i in range(len(FIELDS))]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=40)


def of(labels: Any, **arguments: Any) -> TextClassificationData:
    rows = list(zip(TEXTS, labels, strict=True))
    return TextClassificationData.from_rows(rows, rows, tokenizer=TOKENIZER, **{"task": "multi_label", **arguments})


@pytest.mark.parametrize(
    ("labels", "arguments"),
    [
        (FIELDS, {"label_separator": ","}),
        (FIELDS, {"label_separator": ",", "task": None}),
        (LISTS, {}),
        ([tuple(row) for row in LISTS], {}),
        ([row or None for row in LISTS], {}),
        (IDS, {"label_names": ["anger", "joy", "love"]}),
        ([torch.tensor(row) for row in IDS], {"label_names": ["anger", "joy", "love"]}),
        ([";".join(map(str, row)) for row in IDS], {"label_names": ["anger", "joy", "love"], "label_separator": ";"}),
    ],
)
def test_rows_of_zeros_and_ones(labels: Any, arguments: dict[str, Any]) -> None:
    data = of(labels, **arguments)
    data.setup()
    assert (data.task, data.num_labels, data.label_names) == ("multi_label", 3, ["anger", "joy", "love"])
    batches = list(data.predict_dataloader())
    found = torch.cat([batch["labels"] for batch in batches])
    assert found.dtype == torch.float32
    assert found.tolist() == MultiLabelBinarizer(classes=data.label_names).fit_transform(LISTS).tolist()
    assert [row for _, row in data.rows("test")] == [tuple(sorted(row)) for row in IDS]


def test_ids_without_names_name_themselves() -> None:
    assert of(IDS).label_names == ["0", "1", "2"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "tsv"])
def test_files(tmp_path: Path, ending: str) -> None:
    file, separator = tmp_path / f"train.{ending}", None
    rows = [{"sentence": text, "label": row} for text, row in zip(TEXTS, LISTS, strict=True)]
    if ending == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        separator = ","
        lines = [f"{text}\t{field}" for text, field in zip(TEXTS, FIELDS, strict=True)]
        file.write_text("\n".join(["sentence\tlabel", *lines]))
    data = TextClassificationData(file, file, task="multi_label", label_separator=separator)
    assert [row for _, row in data.rows("train")] == [tuple(sorted(row)) for row in IDS]


def test_weights_are_those_that_torch_advises() -> None:
    data = of(LISTS, class_weights="balanced")
    with_label = MultiLabelBinarizer().fit_transform(LISTS).sum(0)
    expected = [(len(LISTS) - count) / count for count in with_label.tolist()]
    assert data.class_weights == pytest.approx(expected)
    assert HardLabel(**data.label_weights).pos_weight == pytest.approx(expected)  # type: ignore[arg-type]
    assert of(LISTS).label_weights == {}
    assert of(LISTS, class_weights=[1.0, 2.0, 3.0]).label_weights == {"pos_weight": [1.0, 2.0, 3.0]}
    single = of(["a", "b"] * 9, task="classification", class_weights="balanced")
    assert single.label_weights == {"class_weights": [1.0, 1.0]}
    with pytest.raises(ValueError, match=r"18 of 18 training rows have the label 'all'"):
        _ = of([["all"], ["all", "some"]] * 9, class_weights="balanced").class_weights
    for wrong in ({"class_weights": [1.0, 0.0, 1.0]}, {"balanced": True}):
        with pytest.raises(ValueError, match=f"Expected argument `{next(iter(wrong))}`"):
            of(LISTS, **wrong)


@pytest.mark.parametrize(
    ("labels", "arguments", "said"),
    [
        (LISTS, {"task": "classification"}, r"train rows:1: .*\['joy', 'love'\], a list, .*--data.task multi_label"),
        ([[0, 1, 0], [1, 0, 1]] * 9, {}, r"train rows:1: .*with a label twice; .*by name or number, not a 0 or 1"),
        (["a,,b", "b"] * 9, {"label_separator": ","}, "train rows:1: empty label"),
        ([[["a"]], ["b"]] * 9, {}, r"train rows:1: column 'label' holds \['a'\], which is neither text nor"),
        ([[], []] * 9, {}, "no row has a label"),
        ([["a"], ["a"]] * 9, {}, "every row has the label 'a'"),
    ],
)
def test_labels_that_cannot_be_right(labels: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        of(labels, **arguments).rows("train")


def test_a_label_that_no_training_row_has_is_named() -> None:
    rows = list(zip(TEXTS, LISTS, strict=True))
    data = TextClassificationData.from_rows(rows, [("x", ["joi"])], tokenizer=TOKENIZER, task="multi_label")
    with pytest.raises(ValueError, match=r"val rows:1: unknown label 'joi'.*did you mean 'joy'"):
        data.rows("val")


@pytest.mark.parametrize("task", ["classification", "multi_label"])
def test_labels_that_are_made_of_others_are_not_passed_over(task: str) -> None:
    labels = ["joy", "love", "joy,love"] * 6
    with pytest.warns(UserWarning, match=r"the label 'joy,love' .* is made of others; .*--data.label_separator ','"):
        assert of(labels, task=task).num_labels == 3


@pytest.mark.parametrize("arguments", [{"label_separator": ""}, {"label_separator": ",", "task": "regression"}])
def test_a_separator_goes_with_several_labels(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`label_separator` to be text, beside task='multi_label'"):
        of(LISTS, **arguments)


def test_lists_with_the_names_of_their_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kind = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.Sequence(datasets.ClassLabel(names=["no", "yes", "so"]))}
    )
    (tmp_path / "set").mkdir()
    rows = {"text": TEXTS, "labels": IDS}
    datasets.Dataset.from_dict(rows, features=kind).to_parquet(tmp_path / "set" / "train.parquet")
    data = TextClassificationData(
        hub_dataset=str(tmp_path / "set"), text_columns="text", label_column="labels", task="multi_label", val_split=0.2
    )
    assert data.label_names == ["no", "yes", "so"]
    assert set(data.rows("train") + data.rows("val")) == {
        ((text,), tuple(sorted(row))) for text, row in zip(TEXTS, IDS, strict=True)
    }


@pytest.mark.skipif(not GOEMOTIONS.is_dir(), reason="needs ../shared/data/goemotions")
def test_goemotions() -> None:
    file, columns = GOEMOTIONS / "dev.tsv", {"text_columns": "text", "label_column": "labels"}
    data = TextClassificationData(file, file, **columns, label_separator=",")  # type: ignore[arg-type]
    assert (data.num_rows("train"), data.num_labels) == (5_426, 28)
    several = [row for _, row in data.rows("train") if len(row) > 1]
    assert 0.15 < len(several) / 5_426 < 0.17
