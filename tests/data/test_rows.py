"""What every data module of rows has from ``RowData``: values of any kind, splits, class names, notes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from lightning_distill.data.rows import RowData
from lightning_distill.data.table import Table


class Values(Dataset):
    """What is in a column, as it is."""

    def __init__(self, table: Table) -> None:
        self.values, self.labels = table.columns["value"], table.columns["tags"]
        self.lengths, self.note = [1] * len(table), f"{len(table)} rows"

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        return self.values[index]


class TagData(RowData):
    """Lists of tags beside any value."""

    task = "token_classification"
    columns = ("value", "tags")
    label_column = "tags"
    binary_columns = ("value",)

    def label_table(self, table: Table) -> Table:
        return table.explode("tags")

    def dataset_of(self, table: Table) -> Values:
        return Values(table)


ROWS: list[tuple[Any, list[str]]] = [
    (b"\x89PNG", ["B", "O"]),
    ({"bytes": b"x"}, ["O"]),
    (["two", "words"], ["I", "O"]),
    ("text", []),
]


def test_values_and_labels_may_be_anything_in_memory() -> None:
    data = TagData.from_rows(ROWS, ROWS)
    data.setup()
    assert (data.label_names, data.num_labels, data.id2label[0]) == (["B", "I", "O"], 3, "B")
    assert data.label_ids(data._tables["train"]) == [0, 2, 2, 1, 2]
    assert [data._datasets["train"][row] for row in range(4)] == [value for value, _ in ROWS]
    assert data.num_rows("val") == 4


def test_values_may_be_anything_in_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"value": {"a": [1]}, "tags": ["x", "y"]}, {"value": [2], "tags": ["y"]}]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TagData(lines, lines)
    assert data._tables["train"].columns["value"] == [{"a": [1]}, [2]]
    assert data.label_names == ["x", "y"]
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"value": [b"a", b"b"], "tags": [["x"], ["y", "x"]], "other": [1, 2]}), file)
    data = TagData(file, file)
    with caplog.at_level("INFO"):
        data.setup()
    assert data._tables["train"].columns == {"value": [b"a", b"b"], "tags": [["x"], ["y", "x"]]}
    said = [record.message for record in caplog.records if "rows.parquet" in record.message]
    assert said == [f"{file}: 2 rows; columns that are not used: other"]


def test_class_names_that_the_source_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
    features = datasets.Features({"value": datasets.Value("string"), "tags": names})
    rows = datasets.Dataset.from_dict({"value": ["a b", "c"], "tags": [[1, 2], [0]]}, features=features)
    folder = tmp_path / "set"
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")
    for data in (TagData(folder / "train.parquet", folder / "train.parquet"), TagData(hub_dataset=str(folder))):
        assert data.label_names == ["O", "B-PER", "I-PER"]
        assert data.label_ids(Table("t", {"tags": [[1, 2], [0]]}, [1, 2])) == [1, 2, 0]


def test_a_label_of_a_list_is_said_with_its_row() -> None:
    with pytest.raises(ValueError, match=r"train rows:2: column 'tags' holds 'O', which is not a list"):
        _ = TagData.from_rows([("a", ["O", "B"]), ("b", "O")]).label_names
    data = TagData.from_rows([("a", ["O", "B"]), ("b", ["O"])], [("c", ["O"]), ("d", ["O", "X"])])
    with pytest.raises(ValueError, match=r"val rows:2: unknown label 'X' in column 'tags'; the labels of train rows"):
        data.label_ids(data._tables["val"])


def test_collate_pads_labels_of_tokens_and_stacks_the_rest() -> None:
    from lightning_distill.data.tokenized import pad_rows

    rows = [
        {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([1, 0]), "soft": torch.tensor([0.5, 0.5])},
        {"input_ids": torch.tensor([7]), "labels": torch.tensor([2]), "soft": torch.tensor([1.0, 0.0])},
    ]
    batch = pad_rows(rows, pad_token_id=9)
    assert batch["labels"].tolist() == [[1, 0], [2, -100]]
    assert batch["soft"].tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
