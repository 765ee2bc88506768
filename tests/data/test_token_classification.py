"""Words with tags: what is read, how words are cut into pieces, which tags are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lightning_distill.data import TokenClassificationData, train_tokenizer
from lightning_distill.data.conll import read_conll
from lightning_distill.data.source_names import source_names
from lightning_distill.data.token_classification import TokenizedWords

WNUT = Path(__file__).parents[3] / "shared" / "data" / "wnut17"
ROWS = [(["New", "York", "is", "big"], ["B-place", "I-place", "O", "O"]), (["It", "is"], ["O", "O"])] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["new york is big it"], vocab_size=30)


def refused(data: TokenClassificationData) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is what is tested
        data.setup()
    said = str(error.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("text", ["New\tB-x\nYork\tI-x\n\n\nis\tO\n", "New NNP B-x\nYork NNP I-x\n\nis VBZ O\n"])
def test_one_token_a_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "train.conll").write_text(f"-DOCSTART-\tO\n\n{text}")
    table = read_conll(tmp_path / "train.conll")
    assert table.columns["tokens"] == [["New", "York"], ["is"]]
    assert table.columns["tags"] == [["B-x", "I-x"], ["O"]]
    assert table.lines[0] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("New\tB-x\nYork\n", r"train\.conll:2: 1 fields where the first line has 2"),
        ("New\n", r"train\.conll:1: no fields 0 and -1 in 'New', which has 1"),
        ("New\tB-x\n\tO\n", r"train\.conll:2: an empty token"),
        ("New\tB-x\nYork\t\n", r"train\.conll:2: an empty tag"),
        ("\n\n", r"train\.conll: the file has no tokens"),
    ],
)
def test_lines_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.conll").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_conll(tmp_path / "train.conll")


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path, tokenizer: Any) -> None:
    lines = "\n\n".join("\n".join(map("\t".join, zip(*row, strict=True))) for row in ROWS)
    (tmp_path / "a.conll").write_text(lines)
    objects = [json.dumps({"tokens": words, "tags": tags}) for words, tags in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join(objects))
    names = ["O", "B-place", "I-place"]
    numbers = [json.dumps({"tokens": w, "tags": [names.index(tag) for tag in tags]}) for w, tags in ROWS]
    (tmp_path / "b.jsonl").write_text("\n".join(numbers))
    made = [
        TokenClassificationData(train_file=tmp_path / name, tokenizer=tokenizer, label_names=names)
        for name in ("a.conll", "a.jsonl", "b.jsonl")
    ]
    for data in made:
        data.setup()
        assert data.rows("train") == made[0].rows("train")
        batches = [next(iter(x.val_dataloader())) for x in (data, made[0])]
        assert torch.equal(batches[0]["labels"], batches[1]["labels"])
    assert made[0].id2label == dict(enumerate(names))


@settings(deadline=None, max_examples=50)
@given(
    words=st.lists(st.text("abkxy", min_size=1, max_size=9), min_size=1, max_size=12),
    max_length=st.integers(4, 20),
    stride=st.none() | st.integers(0, 1),
    all_pieces=st.booleans(),
)
def test_each_word_has_its_label_once(words: list[str], max_length: int, stride: int | None, all_pieces: bool) -> None:
    tokenizer = train_tokenizer(["abk xy"], vocab_size=20)
    labels = list(range(len(words)))
    rows = TokenizedWords([words], [labels], tokenizer, max_length, stride, all_pieces)
    found = [label for row in range(len(rows)) for label in rows[row]["labels"].tolist() if label != -100]
    assert all(length <= max_length for length in rows.lengths)
    whole = tokenizer([words], is_split_into_words=True)
    reached = (
        labels if stride is not None else sorted({w for w in whole.word_ids(0)[: max_length - 1] if w is not None})
    )
    if all_pieces:
        assert sorted(set(found)) == reached
    else:
        assert found == reached
    assert bool(rows.note) == (len(reached) < len(words))


def test_pieces_of_a_word(tokenizer: Any) -> None:
    for all_pieces in (False, True):
        rows = TokenizedWords([["big", "yyy"]], [[1, 2]], tokenizer, 16, label_all_pieces=all_pieces)
        found = rows[0]["labels"].tolist()
        of_words = rows._fields["input_ids"].tolist()
        assert len(found) == len(of_words)
        assert found[0] == found[-1] == -100
        assert (found.count(1) + found.count(2) == len(of_words) - 2) == all_pieces


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        (["a", "b"], ["O"], r"train rows:1: 1 tags in 'tags' for 2 words"),
        ("a b", ["O", "O"], r"train rows:1: column 'tokens' holds 'a b', which is not a list"),
        (["a", ""], ["O", "O"], r"train rows:1: word 1 of column 'tokens' is '', expected text"),
        ([], [], r"train rows:1: no words in 'tokens'"),
        (["a", "b"], "O O", r"train rows:1: column 'tags' holds 'O O', which is not a list"),
        (["a", "b"], ["O", None], r"train rows:1: empty label in column 'tags'"),
        (["a", "b"], ["O", "I-x"], r"train rows:1: the tag 'I-x' after 'O', where 'O' or 'B-\.\.\.' may be"),
        (["a", "b"], ["B-y", "I-x"], r"the tag 'I-x' after 'B-y', where 'O' or 'B-\.\.\.' or 'I-y' may be"),
        (["a", "b"], ["I-x", "I-x"], r"the tag 'I-x' at the beginning of a row"),
    ],
)
def test_rows_that_are_wrong(words: Any, tags: Any, message: str, tokenizer: Any) -> None:
    rows: list[Any] = [(words, tags), (["c"], ["B-x"]), (["d"], ["B-y"])]
    with pytest.raises(ValueError, match=message):
        TokenClassificationData.from_rows(rows, tokenizer=tokenizer).setup()


def test_an_entity_without_a_beginning(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "old.conll").write_text("a\tO\n\nNew\tI-x\nYork\tI-x\nit\tB-x\n\nis\tO\n\nbig\tO\n")
    options = {"train_file": tmp_path / "old.conll", "tokenizer": tokenizer}
    assert "old.conll:3: the tag 'I-x' at the beginning of a row" in refused(TokenClassificationData(**options))
    for bio, expected in (("repair", ["B-x", "I-x", "B-x"]), ("accept", ["I-x", "I-x", "B-x"])):
        data = TokenClassificationData(**options, bio=bio, val_file=tmp_path / "old.conll")  # type: ignore[arg-type]
        assert data.rows("train")[1][1] == expected


def test_tags_that_name_no_entities_are_not_held_to_bio(tokenizer: Any) -> None:
    data = TokenClassificationData.from_rows([(["it", "is"], ["PRP", "I-VBZ"])] * 3, tokenizer=tokenizer)
    assert data.label_names == ["I-VBZ", "PRP"]


def test_roles_of_names() -> None:
    rows = source_names(400, seed=1)
    assert rows == source_names(400, seed=1)
    assert rows != source_names(400, seed=2)
    data = TokenClassificationData.from_rows(rows, tokenizer=train_tokenizer(["x"], vocab_size=20))
    roles = ("argument", "attribute", "class", "function", "module", "variable")
    assert {f"B-{role}" for role in roles} <= set(data.label_names) <= {*(f"B-{r}" for r in roles), "I-module", "O"}
    for words, tags in rows:
        assert len(words) == len(tags) >= 6
        if words[0] == "def":
            assert tags[:3] == ["O", "B-function", "O"]


@pytest.mark.skipif(not WNUT.is_dir(), reason="needs ../shared/data/wnut17")
def test_wnut17() -> None:
    files = {f"{split}_file": WNUT / f"{split}.conll" for split in ("train", "test")} | {"val_file": WNUT / "dev.conll"}
    data = TokenClassificationData(**files)
    assert [data.num_rows(split) for split in ("train", "val", "test")] == [3394, 1009, 1287]
    assert len(data.label_names) == 13
