import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_distill.data import TextClassificationData, embedded_corpus, train_causal_tokenizer, train_tokenizer


def test_corpus_is_balanced_unique_and_the_same_each_time() -> None:
    modules = set(sys.modules)
    rows = embedded_corpus(60)
    assert set(sys.modules) == modules  # nothing was imported
    assert rows == embedded_corpus(60)
    assert rows != embedded_corpus(60, seed=1)
    counts = Counter(label for _, label in rows)
    assert set(counts.values()) == {60}
    assert len(counts) == 7
    assert len({text for text, _ in rows}) == len(rows)
    assert not [text for text, label in rows if label in text.lower().replace("_", " ").split()]
    assert all(text == " ".join(text.split()) for text, _ in rows)


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    texts = [text for text, _ in embedded_corpus(40)]
    tokenizer = train_tokenizer(texts, vocab_size=600)
    assert len(tokenizer) == 600
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for name in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(loaded, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")
    assert loaded(texts[:20], texts[20:40])["input_ids"] == tokenizer(texts[:20], texts[20:40])["input_ids"]
    assert loaded(texts[0], texts[1]).keys() == {"input_ids", "token_type_ids", "attention_mask"}
    assert loaded.decode(loaded("A Tensor, returned.")["input_ids"]) == "[CLS] a tensor, returned. [SEP]"


@pytest.mark.parametrize("train", [train_tokenizer, train_causal_tokenizer])
def test_a_tokenizer_is_the_same_each_time(train: Any) -> None:
    # As in another process: a run that is resumed there must read its text as before.
    texts = [text for text, _ in embedded_corpus(60)]
    vocabularies = [train(texts, vocab_size=600).get_vocab() for _ in range(5)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_letters_within_words_are_no_special_tokens() -> None:
    tokenizer = train_tokenizer(["a tensor of shape", "a tensor of zeros"], vocab_size=60)
    assert set(tokenizer.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert tokenizer.tokenize("ra tensor [SEP]")[-2:] == ["tensor", "[SEP]"]
    assert tokenizer.decode(tokenizer("rats")["input_ids"], skip_special_tokens=True) == "rats"


def test_data_module() -> None:
    data = TextClassificationData.embedded(max_rows_per_class=30, vocab_size=500, batch_size=16)
    data.setup()
    splits = {name: {text for text, _ in data.rows(name)} for name in ("train", "val", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 168, "val": 21, "test": 21}
    assert not splits["train"] & splits["test"]
    assert data.num_labels == 7
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 168
