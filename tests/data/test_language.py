"""Text for language models: where it comes from, how it is split, in which order it is read, bad input."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distill.data import LanguageModelData, train_causal_tokenizer

TEXTS = [f"the {animal} sat on the {place}." for animal in ("cat", "dog", "hen", "cow") for place in ("mat", "log")] * 5
TOKENIZER = train_causal_tokenizer(TEXTS, vocab_size=280)


def data(**kwargs: Any) -> LanguageModelData:
    return LanguageModelData(**{"tokenizer": TOKENIZER, "max_length": 32, "batch_size": 2, **kwargs})


def decoded(split: Any) -> list[str]:
    return [TOKENIZER.decode(document.ids, skip_special_tokens=True) for document in split]


def test_files_of_every_kind_give_their_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\n\ntwo\nlines\n<|endoftext|>\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("three", "four")))
    (tmp_path / "val.txt").write_text("a document without a separator")
    found = data(
        text_files=[str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")],
        val_files=str(tmp_path / "val.txt"),
        test_files=str(tmp_path / "val.txt"),
    )
    found.setup()
    assert decoded(found.documents("train")) == ["one", "two\nlines", "three", "four"]
    assert decoded(found.documents("val")) == ["a document without a separator"]


def test_splits_are_disjoint_whole_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(100)]
    splits = [
        [decoded(made.documents(split)) for split in ("train", "val", "test")]
        for made in (LanguageModelData.from_texts(texts, tokenizer=TOKENIZER, seed=seed) for seed in (3, 3, 4))
    ]
    assert splits[0] == splits[1] != splits[2]
    assert sorted(itertools.chain.from_iterable(splits[0])) == sorted(texts)
    assert [len(part) for part in splits[0]] == [90, 5, 5]


def test_frames_are_the_tokenizers_own_and_an_end_is_added_where_asked() -> None:
    tokenizer = train_causal_tokenizer(TEXTS, vocab_size=280)
    tokenizer.backend_tokenizer.post_processor = None
    for add_eos, ends in ((False, False), (True, True)):
        made = LanguageModelData.from_texts(TEXTS, tokenizer=tokenizer, add_eos=add_eos)
        assert all((d.ids[-1] == tokenizer.eos_token_id) is ends for d in made.documents("train"))
    framed = LanguageModelData.from_texts(TEXTS, tokenizer=TOKENIZER, add_eos=True).documents("train")[0].ids
    assert framed[0] == TOKENIZER.bos_token_id
    assert framed.count(TOKENIZER.eos_token_id) == 1


def test_an_epoch_resumes_in_the_middle_and_evaluation_sees_each_row_once() -> None:
    made = LanguageModelData.from_texts(TEXTS, tokenizer=TOKENIZER, max_length=16, batch_size=4)
    made.setup()
    loader = made.train_dataloader()
    whole = [batch["input_ids"] for batch in loader]
    again = made.train_dataloader()
    iterator = iter(again)
    next(iterator)
    resumed = made.train_dataloader()
    resumed.load_state_dict(again.state_dict())  # type: ignore[attr-defined]
    rest = [batch["input_ids"] for batch in resumed]
    assert len(whole) > 2
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))
    assert sum(len(batch["labels"]) for batch in made.test_dataloader()) == len(made.dataset("test"))


def test_at_most_so_many_training_documents() -> None:
    made = LanguageModelData.from_texts(TEXTS, tokenizer=TOKENIZER, max_train_documents=7)
    assert len(made.documents("train")) == 7


def test_a_tokenizer_gives_every_text_back() -> None:
    text = "Straße, 日本 \t and\n\nlines"
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_files": "a.txt", "hub_dataset": "b"}, "`text_files` and `hub_dataset`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"max_length": 1}, "`max_length`"),
        ({"max_train_documents": 0}, "`max_train_documents`"),
        ({"val_split": 0.0}, "`val_split`"),
        ({"separator": ""}, "`separator`"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**arguments)


def test_hub_dataset_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "stories"
    folder.mkdir()
    for split, texts in (("train", TEXTS), ("validation", TEXTS[:4])):
        datasets.Dataset.from_dict({"story": texts}).to_parquet(folder / f"{split}.parquet")
    made = LanguageModelData(hub_dataset=str(folder), text_column="story", tokenizer=TOKENIZER)
    assert made._texts["val"] == list(TEXTS[:4])
    assert sorted(made._texts["train"] + made._texts["test"]) == sorted(TEXTS)
    made.setup()
    assert made.dataset("val").num_labels == sum(len(document.ids) - 1 for document in made.documents("val"))
    with pytest.raises(ValueError, match=r"stories \(train\): no column 'text'"):
        LanguageModelData(hub_dataset=str(folder), tokenizer=TOKENIZER).setup()


def test_bad_files(tmp_path: Path) -> None:
    for name, content, message in (
        ("none.txt", None, "none.txt: there is no such file"),
        ("empty.txt", "<|endoftext|>\n", "empty.txt: the file has no text"),
        ("one.txt", "one document", "Set `separator`"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            data(text_files=str(tmp_path / name)).setup()
    with pytest.raises(ValueError, match="set `text_files` or `hub_dataset`"):
        data().setup()
    with pytest.raises(ValueError, match="Expected argument `tokenizer`"):
        LanguageModelData.from_texts(TEXTS).setup()
    tokenizer = train_causal_tokenizer(TEXTS, vocab_size=280)
    tokenizer.backend_tokenizer.post_processor, tokenizer.eos_token = None, None
    with pytest.raises(ValueError, match="beside `add_eos`"):
        LanguageModelData.from_texts(TEXTS, tokenizer=tokenizer, add_eos=True).setup()
