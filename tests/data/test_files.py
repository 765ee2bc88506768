import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_distill.data.columns import label_ids, label_names, scores, texts
from lightning_distill.data.readers import read_table
from lightning_distill.data.table import Table

COLUMNS = ["sentence", "label"]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_same_rows_from_each_kind_of_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet_format = pytest.importorskip("pyarrow.parquet")
    rows = [('she said "no" ,', "1"), ("line\u2028separator and\x0cform feed", "0"), ("naïve 日本", "1")]
    columns = {"sentence": [text for text, _ in rows], "label": [label for _, label in rows]}
    tsv = write(tmp_path, "a.tsv", "label\tsentence\n" + "".join(f"{label}\t{text}\n" for text, label in rows))
    quoted = [text.replace('"', '""') for text, _ in rows]
    csv_file = write(
        tmp_path,
        "a.csv",
        "sentence,id,label\r\n" + "".join(f'"{t}",7,{r[1]}\r\n' for t, r in zip(quoted, rows, strict=True)),
    )
    jsonl = write(tmp_path, "a.jsonl", "".join(json.dumps({"sentence": t, "label": b}) + "\n" for t, b in rows) + "\n")
    parquet = tmp_path / "a.parquet"
    parquet_format.write_table(pyarrow.table(columns | {"extra": [1, 2, 3]}), parquet)
    for path in (tsv, csv_file, jsonl, parquet):
        assert read_table(path, COLUMNS).columns == columns, path
    assert read_table(tsv, COLUMNS).lines == [2, 3, 4]
    assert read_table(jsonl, COLUMNS).lines == [1, 2, 3]


def test_a_csv_record_may_span_lines(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", '\ufeffsentence,label\n"two\nlines",x\nb,y\n'), COLUMNS)
    assert table.columns["sentence"] == ["two\nlines", "b"]
    assert table.lines == [2, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", ": the file is empty"),
        ("a.tsv", "sentence\tlabel\n", ": the file has no rows"),
        ("a.jsonl", "\n", ": the file has no rows"),
        ("a.tsv", "text\tlabels\na\t1\n", ":1: no column 'sentence'; the columns are text, labels"),
        ("a.csv", "sentense,label\na,1\n", ":1: no column 'sentence' (did you mean 'sentense'?); the columns are"),
        ("a.tsv", "sentence\tlabel\na\t1\nb\n", ":3: 1 fields where the header has 2"),
        ("a.csv", "sentence,label\na,1\n\nb,c,2\n", ":4: 3 fields where the header has 2"),
        ("a.csv", 'sentence,label\na,1\n"open,2\n', ":3: not a csv record (unexpected end of data)"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b", "label"\n', ":2: not JSON ("),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n["b"]\n', ":2: expected a JSON object, but got list"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b"}\n', ":2: no column 'label'; the columns are"),
        ("a.tsv", b"sentence\tlabel\na\t1\n\xff\t0\n", ":3: not UTF-8 text (invalid start byte)"),
        ("a.parquet", "sentence\tlabel\n", ": not a parquet file ("),
        ("a.txt", "a", ": unknown kind of file '.txt'; known are .tsv, .csv, .jsonl, .parquet"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")) as caught:
        read_table(path, COLUMNS)
    assert "\n" not in str(caught.value)


def test_missing_file_and_missing_parquet_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.tsv: there is no such file"):
        read_table(tmp_path / "nowhere.tsv", COLUMNS)
    pyarrow = pytest.importorskip("pyarrow")
    parquet_format = pytest.importorskip("pyarrow.parquet")
    parquet_format.write_table(pyarrow.table({"sentence": ["a"], "labels": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'label' \(did you mean 'labels'\?\)"):
        read_table(tmp_path / "a.parquet", COLUMNS)


def table(labels: list[object]) -> Table:
    return Table("t.tsv", {"sentence": ["text"] * len(labels), "label": labels}, list(range(2, len(labels) + 2)))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-1", "9"], ["-1", "9", "10"]),
        ([10, 9, 9], ["9", "10"]),
        ([True, False], ["0", "1"]),
        (["b", "a", "10"], ["10", "a", "b"]),
        ([" yes ", "no", "yes"], ["no", "yes"]),
    ],
)
def test_order_of_labels(labels: list[object], names: list[str]) -> None:
    assert label_names(table(labels), "label") == names
    ids = label_ids(table(labels), "label", names, "t.tsv")
    assert [names[i] for i in ids] == [str(int(v)) if isinstance(v, bool) else str(v).strip() for v in labels]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a"], "t.tsv: every row has the label 'a'"),
        (["a", "", "b"], "t.tsv:3: empty label"),
        (["a", None], "t.tsv:3: empty label"),
        (["1", "2.5"], "t.tsv:3: the label '2.5' is a fraction; set task to 'regression'"),
        ([0.25, 0.5], "t.tsv:2: the label 0.25 is a fraction"),
    ],
)
def test_wrong_labels(labels: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        label_names(table(labels), "label")


def test_unknown_label() -> None:
    with pytest.raises(ValueError, match=r"t\.tsv:3: unknown label 'c' in .*; the labels of train\.tsv are a, b"):
        label_ids(table(["a", "c"]), "label", ["a", "b"], "train.tsv")


@pytest.mark.parametrize("value", ["x", "nan", "inf", None, ""])
def test_scores_must_be_finite(value: object) -> None:
    assert scores(table(["1", -2.5]), "label") == [1.0, -2.5]
    with pytest.raises(ValueError, match=r"t\.tsv:3: column 'label' holds .*, which is not a finite number"):
        scores(table(["1", value]), "label")


def test_texts_must_be_text() -> None:
    pairs = Table("t", {"a": ["x", " "], "b": ["", ""]}, [2, 3])
    with pytest.raises(ValueError, match="t:3: no text in 'a' or 'b'"):
        texts(pairs, ["a", "b"])
    with pytest.raises(ValueError, match="t:2: column 'a' holds 5, which is not text"):
        texts(Table("t", {"a": [5]}, [2]), ["a"])


@settings(deadline=None, max_examples=150)
@given(content=st.binary(max_size=200) | st.text(alphabet='ab01"\t\n\r,{}:\x00é', max_size=80).map(str.encode))
@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_any_bytes_are_rows_or_one_line_of_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, content: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp(), f"any.{kind}", b"a\tb\n" * (kind == "tsv") + content)
    problem = f"{path}: no problem"
    try:
        rows = read_table(path, ["a", "b"])
    except ValueError as error:
        problem = str(error)
    else:
        assert len(rows) == len(rows.columns["a"]) == len(rows.columns["b"]) > 0
    assert problem.startswith(str(path))
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("name", "rows"),
    [("sst2/train", 67349), ("sst2/dev", 872), ("sst2/test", 1821), ("trec/train", 5452), ("trec/test", 500)],
)
def test_real_files_have_the_rows_their_sources_state(shared: Path, name: str, rows: int) -> None:
    data = read_table(shared / "data" / f"{name}.tsv", COLUMNS)
    assert len(data) == rows
    assert len(texts(data, ["sentence"])) == rows
    assert len(label_names(data, "label")) == (2 if "sst2" in name else 6)
