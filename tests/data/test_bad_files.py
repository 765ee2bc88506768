"""Bad data files: each is read, or one line says which file and where. The same through all that reads them."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_distill.data import LanguageModelData, TextClassificationData, train_causal_tokenizer, train_tokenizer
from tests.data.bad_files import BadFile, label_files, objects, parquet_files, records, text_files

FILES = [*text_files(), *records(), *objects(), *label_files()]
if importlib.util.find_spec("pyarrow"):
    FILES += parquet_files()
TOKENIZER = train_tokenizer(["a good film", "a bad film"] * 3, vocab_size=60)
CAUSAL: PreTrainedTokenizerFast = train_causal_tokenizer(["a good film", "a bad film"] * 3, vocab_size=280)


def given(folder: Path, file: BadFile) -> Path:
    path = folder / file.name
    if isinstance(file.content, bytes):
        path.write_bytes(file.content)
    elif file.content is not None:
        file.content(path)
    return path


def problem(make: Any) -> str | None:
    try:
        make().setup()
    except ValueError as error:
        return str(error)
    return None


def test_there_are_many() -> None:
    assert len(FILES) > 200
    assert len({file.name for file in FILES}) == len(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_labelled_text(tmp_path: Path, file: BadFile) -> None:
    path = given(tmp_path, file)
    said = problem(lambda: TextClassificationData(path, path, tokenizer=TOKENIZER, **file.arguments))
    if file.said is None:
        assert said is None
        return
    assert said is not None, "it was taken"
    assert file.said in said, said
    assert said.startswith((str(path), "Expected argument")), said
    assert said.isprintable()
    assert len(said) < 1000


@pytest.mark.parametrize("file", [file for file in FILES if "label_column" not in file.arguments], ids=lambda f: f.name)
def test_text_for_language_models(tmp_path: Path, file: BadFile) -> None:
    path = given(tmp_path, file)
    data = LanguageModelData(str(path), str(path), str(path), text_column="sentence", tokenizer=CAUSAL, max_length=64)
    said = problem(lambda: data)
    if file.said is None:
        assert said is None
    elif said is not None:  # what is wrong with labels is not looked at
        assert said.startswith(str(path)), said
        assert said.isprintable()


def test_plain_text(tmp_path: Path) -> None:
    for name, content, said in (
        ("a.txt", b"one\n<|endoftext|>\ntwo", None),
        ("A.TXT", b"\xef\xbb\xbfone\n<|endoftext|>\ntwo", None),
        ("nul.txt", b"one\ntw\0o", ":2: a NUL character"),
        ("latin1.txt", b"one\ncaf\xe9", ":2: not UTF-8 text"),
        ("utf16.txt", "one".encode("utf-16"), "it looks like UTF-16"),
        ("blank.txt", b" \n \n", "the file has no text"),
        ("cut.txt.gz", b"\x1f\x8b\x08\x00", ":1: not a whole gz file"),
    ):
        (tmp_path / name).write_bytes(content)
        path = str(tmp_path / name)
        found = problem(lambda path=path: LanguageModelData(path, path, path, tokenizer=CAUSAL))
        assert (found is None) if said is None else (found is not None and found.startswith(path) and said in found)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\n")

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    for method in ("open", "is_file"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, method, refused)
            said = problem(lambda: TextClassificationData(tmp_path / "a.tsv", tokenizer=TOKENIZER))
        assert said == f"{tmp_path}/a.tsv: Permission denied"
    long = problem(lambda: TextClassificationData("x" * 5000 + ".tsv", tokenizer=TOKENIZER))
    assert long is not None
    assert "name too long" in long


def test_classes_of_files_that_do_not_have_the_same(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.tsv" for name in ("train", "val", "test")}
    for name, labels in (("train", ["pos", "neg", "mid"]), ("val", ["pos", "pos"]), ("test", ["neg", "Pos"])):
        files[name].write_text("sentence\tlabel\n" + "".join(f"x\t{label}\n" for label in labels))
    data = TextClassificationData(files["train"], files["val"], files["val"], tokenizer=TOKENIZER)
    data.setup()
    assert [label for _, label in data.rows("val")] == [2, 2]
    said = problem(lambda: TextClassificationData(files["train"], files["val"], files["test"], tokenizer=TOKENIZER))
    assert said is not None
    assert said.endswith("test.tsv:3: unknown label 'Pos' in column 'label'; the labels of "
                         f"{files['train']} are mid, neg, pos (did you mean 'pos'?)")  # fmt: skip
    files["train"].write_text("sentence\tlabel\nx\tpos\ny\tPos\nz\tneg\n")
    with pytest.warns(UserWarning, match="the labels 'Pos' and 'pos' in column 'label' are two classes"):
        assert TextClassificationData(files["train"]).num_labels == 3


def test_whole_floats_are_the_numbers_they_are(tmp_path: Path) -> None:
    train, val = tmp_path / "train.jsonl", tmp_path / "val.tsv"
    train.write_text('{"sentence": "a", "label": 2.0}\n{"sentence": "b", "label": 10}\n')
    val.write_text("sentence\tlabel\na\t10.0\nb\t2\n")
    data = TextClassificationData(train, val)
    assert data.label_names == ["2", "10"]
    assert [label for _, label in data.rows("val")] == [1, 0]
    named = TextClassificationData(val, val, label_names=["2.0", "10.0"])
    assert [label for _, label in named.rows("val")] == [1, 0]


def test_the_limit_of_the_csv_module_is_as_it_was(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    path = tmp_path / "a.csv"
    path.write_text('sentence,label\n"' + "x" * 200_000 + '",a\ny,b\n')
    assert len(TextClassificationData(path, path).rows("train")[0][0][0]) == 200_000
    assert csv.field_size_limit() == before
