"""Vocabulary pruning: the same answers to the same text, of fewer embeddings."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lightning_distill.compression import prune_vocabulary
from lightning_distill.models.pretrained import export
from tests.students.architectures import CASES, build, example

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXT = Path(random.__file__).read_text("utf-8").split("\n\n")
LINES = [line.strip() for part in TEXT for line in part.splitlines() if line.strip()]


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def bytelevel() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def suffixed() -> Tokenizer:
    """BPE as CLIP's: the last piece of a word says that it is the last."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def spelt() -> Tokenizer:
    """BPE as Llama 2's: a space is a character of its own, and what is unknown is spelt in bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*SPECIAL, *bytes_])
    tokenizer.train_from_iterator(LINES, trainer)
    state = tokenizer.to_str()
    return Tokenizer.from_str(state)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(LINES, trainer)
    around = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    return tokenizer


KINDS = {kind.__name__: kind for kind in (wordpiece, bytelevel, suffixed, spelt, unigram)}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    names = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param](), **names)


def classifier(vocab_size: int, **fields: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=vocab_size, pad_token_id=1, **sizes, **fields)).eval()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 60))
def test_text_is_split_and_answered_as_before(tokenizer: Any, seed: int, rows: int) -> None:
    texts = random.Random(seed).sample(LINES, rows)
    model = classifier(len(tokenizer))
    small = prune_vocabulary(model, tokenizer, texts)
    assert len(small.kept) == len(small.tokenizer) == small.model.config.vocab_size < len(tokenizer)
    options = {"padding": True, "return_tensors": "pt", "max_length": 64, "truncation": True}
    batch, fewer = tokenizer(texts, **options), small.tokenizer(texts, **options)
    assert torch.equal(small.kept[fewer["input_ids"]], batch["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, small.model(**fewer).logits)
    for text in texts:  # also as it is written again
        assert tokenizer.decode(tokenizer(text).input_ids) == small.tokenizer.decode(small.tokenizer(text).input_ids)


def test_text_whose_tokens_are_gone_still_reads(tokenizer: Any) -> None:
    small = prune_vocabulary(classifier(len(tokenizer)), tokenizer, LINES[:2])
    unknown = tokenizer.unk_token_id
    lost = 0
    for text in LINES:
        before, after = tokenizer(text).input_ids, small.tokenizer(text).input_ids
        assert after.count(small.tokenizer.unk_token_id) == before.count(unknown)
        assert tokenizer.decode(before) == small.tokenizer.decode(after)
        lost += len(after) > len(before)
    assert lost > len(LINES) / 2


def test_rare_tokens_go_and_characters_may(tokenizer: Any) -> None:
    model = classifier(len(tokenizer))
    sizes = [
        len(prune_vocabulary(model, tokenizer, LINES, min_count=count, keep_characters=characters).kept)
        for count, characters in ((1, True), (20, True), (20, False))
    ]
    assert sizes[0] > sizes[1] >= sizes[2]


def test_both_are_loaded_again_by_transformers(tokenizer: Any, tmp_path: Path) -> None:
    small = prune_vocabulary(classifier(len(tokenizer)), tokenizer, LINES[:9])
    export(small.model, tmp_path / "small", small.tokenizer)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    read = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert read(LINES).input_ids == small.tokenizer(LINES).input_ids
    batch = read(LINES[:9], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, small.model(**batch).logits)
    # Once more: what is pruned can be pruned.
    twice = prune_vocabulary(again, read, LINES[:3])
    assert len(twice.kept) < len(small.kept)
    assert tokenizer.decode(tokenizer(LINES[0]).input_ids) == twice.tokenizer.decode(
        twice.tokenizer(LINES[0]).input_ids
    )


WORDS = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0")), unk_token="w0"
)
READERS = [name for name in CASES if "input_ids" in example(build(name)) or name == "whisper"]


@pytest.mark.parametrize("name", READERS)
def test_every_architecture_answers_as_before(name: str, tmp_path: Path) -> None:
    model = build(name).eval()
    inputs = example(model)
    ids = {key: value for key, value in inputs.items() if key.endswith("input_ids")}
    small = prune_vocabulary(model, WORDS, [f"w{i}" for value in ids.values() for i in value.flatten().tolist()])
    vocab_size = len(small.kept)
    assert vocab_size < 40
    fewer = {**inputs, **{key: torch.searchsorted(small.kept, value) for key, value in ids.items()}}
    small.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    for key in ("pad_token_id", "decoder_start_token_id"):
        new, old = (getattr(each.config.get_text_config(), key, None) for each in (again, model))
        assert old is None or old >= 99 or small.kept[new] == old
    with torch.no_grad():
        expected, got, read = model(**inputs), small.model(**fewer), again(**fewer)
    for field, value in got.items():
        if isinstance(value, torch.Tensor):
            before = expected[field]
            before = before[..., small.kept] if before.shape[-1] == 99 else before
            torch.testing.assert_close(value, before, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(read[field], value, rtol=0, atol=0)
    assert next(model.parameters()).shape == next(build(name).parameters()).shape, "the given one stays as it is"


def test_precision_mode_and_frozen_weights_stay() -> None:
    model = classifier(99).to(torch.bfloat16)
    model.classifier.weight.requires_grad_(False)
    model.bert.pooler.float()
    state = torch.get_rng_state()
    small = prune_vocabulary(model, WORDS, ["w5"]).model
    assert torch.equal(state, torch.get_rng_state())
    assert not small.training
    assert not small.classifier.weight.requires_grad
    assert {name: p.dtype for name, p in small.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_what_cannot_be_pruned_is_refused() -> None:
    model = classifier(99)
    with pytest.raises(TypeError, match="`texts` to be many strings, but got one: 'w1'"):
        prune_vocabulary(model, WORDS, "w1")
    with pytest.raises(TypeError, match="`texts` to hold strings, but got None"):
        prune_vocabulary(model, WORDS, ["w1", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="`texts` to hold text, but got none"):
        prune_vocabulary(model, WORDS, [])
    with pytest.raises(ValueError, match="`min_count` to be at least 1, but got 0"):
        prune_vocabulary(model, WORDS, ["w1"], min_count=0)
    with pytest.raises(ValueError, match="ids below the 50 that the model knows, but it has one for 98"):
        prune_vocabulary(classifier(50), WORDS, ["w1"])
    with pytest.raises(ValueError, match="a plain transformers model whose config says its `vocab_size`"):
        prune_vocabulary(torch.nn.Linear(2, 2), WORDS, ["w1"])  # type: ignore[arg-type]
    model.bert.pooler.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"as its config describes it, but got others: .*pooler\.extra"):
        prune_vocabulary(model, WORDS, ["w1"])


def test_the_given_teacher_answers_as_before(shared: Path) -> None:
    folder = shared / "models" / "sst2-minilm-l6"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    lines = (shared / "data" / "sst2" / "dev.tsv").read_text("utf-8").splitlines()
    texts = [line.split("\t")[0] for line in lines[1:65]]
    small = prune_vocabulary(model.eval(), tokenizer, texts)
    batch, fewer = (t(texts, padding=True, return_tensors="pt") for t in (tokenizer, small.tokenizer))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, small.model(**fewer).logits)
    assert len(small.kept) < 4_000 < len(tokenizer)
    assert tokenizer.all_special_tokens == small.tokenizer.all_special_tokens
