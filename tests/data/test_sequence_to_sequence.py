"""Sources and targets: batches as transformers makes them, every kind of file, what is wrong with its file and line."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from lightning_distill import DistillationModule
from lightning_distill.data import SequenceToSequenceData, train_causal_tokenizer, train_tokenizer
from lightning_distill.data.function_names import function_names
from tests.helpers.models import seq2seq

MULTI30K = Path(__file__).resolve().parents[3] / "shared" / "data" / "multi30k"
ROWS = [("ein großer Hund", "a big dog"), ("Hund", "dog"), ("ein Hund , ein Haus", "a dog , a house")] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_causal_tokenizer([text for row in ROWS for text in row], vocab_size=300)


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_those_of_transformers(tokenizer: Any, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "padding_side", side)
    data = SequenceToSequenceData.from_rows(ROWS, ROWS[:3], tokenizer=tokenizer, source_prefix="de: ", max_length=9)
    data.setup()
    rows = [
        tokenizer(f"de: {source}", text_target=target, truncation=True, max_length=9) for source, target in ROWS[:3]
    ]
    for row, (_, target) in zip(rows, ROWS, strict=False):
        row["labels"] = tokenizer(text_target=target)["input_ids"]
    monkeypatch.setattr(tokenizer, "padding_side", "right")
    labels = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows])["labels"]
    monkeypatch.setattr(tokenizer, "padding_side", side)
    expected = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows])
    batch = next(iter(data.predict_dataloader()))
    for name in ("input_ids", "attention_mask"):
        assert batch[name].tolist() == expected[name].tolist()
    assert batch["labels"].tolist() == labels.tolist()  # on the right: a decoder reads them from their start


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.tsv").write_text("\n".join(map("\t".join, [("source", "target"), *ROWS])))
    (tmp_path / "a.csv").write_text("\n".join(f'"{s}","{t}"' for s, t in [("source", "target"), *ROWS]))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"source": s, "target": t}) for s, t in ROWS))
    batches = []
    for name in ("a.tsv", "a.csv", "a.jsonl"):
        data = SequenceToSequenceData(train_file=tmp_path / name, tokenizer=tokenizer)
        data.setup()
        batches.append(next(iter(data.train_dataloader())))
    for batch in batches[1:]:
        assert all(torch.equal(batch[name], batches[0][name]) for name in ("input_ids", "attention_mask", "labels"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Hund\t", r"a\.tsv:3: no text in 'target'"),
        ("Hund\t  ", r"a\.tsv:3: no text in 'target'"),
        ("\tdog", r"a\.tsv:3: no text in 'source'"),
    ],
)
def test_an_empty_text_is_refused_with_its_line(row: str, message: str, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.tsv").write_text(f"source\ttarget\nHund\tdog\n{row}\n")
    with pytest.raises(ValueError, match=message):
        SequenceToSequenceData(train_file=tmp_path / "a.tsv", tokenizer=tokenizer, val_file=tmp_path / "a.tsv").setup()


def test_what_is_wrong_with_arguments(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="`target_column` to be another one"):
        SequenceToSequenceData(source_column="a", target_column="a")
    with pytest.raises(ValueError, match="`max_target_length`"):
        SequenceToSequenceData(max_target_length=0)
    endless = train_causal_tokenizer(["a"], vocab_size=260)
    endless.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match=r"to end a target with '</s>', which a model learns to stop at"):
        SequenceToSequenceData.from_rows(ROWS, tokenizer=endless).setup()


def test_long_texts_are_cut_and_said(tokenizer: Any) -> None:
    data = SequenceToSequenceData.from_rows(ROWS, tokenizer=tokenizer, max_length=4, max_target_length=4)
    data.setup()
    dataset: Any = data.predict_dataloader().dataset
    for row in dataset:
        assert len(row["input_ids"]) <= 4
        assert row["labels"][-1] == tokenizer.eos_token_id
    assert "may be cut" in dataset.note


def test_embedded_rows_train_an_encoder_decoder(tmp_path: Path) -> None:
    assert function_names(50, seed=1) == function_names(50, seed=1) != function_names(50, seed=2)
    data = SequenceToSequenceData.embedded(max_rows=40, vocab_size=300, batch_size=8)
    assert [data.num_rows(split) for split in ("train", "val", "test")] == [32, 4, 4]
    model = seq2seq("Bart", vocab_size=300, max_position_embeddings=256)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1)  # fmt: skip
    trainer.fit(DistillationModule(None, model), datamodule=data)
    assert trainer.callback_metrics["val_perplexity"] > 1


def test_a_tokenizer_that_frames_as_bert_does() -> None:
    framed = train_tokenizer([text for row in ROWS for text in row], vocab_size=80)
    data = SequenceToSequenceData.from_rows(ROWS, tokenizer=framed)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    assert batch["token_type_ids"].shape == batch["input_ids"].shape


@pytest.mark.skipif(not MULTI30K.is_dir(), reason="needs ../shared/data/multi30k")
def test_multi30k() -> None:
    data = SequenceToSequenceData(train_file=MULTI30K / "dev.tsv", val_file=MULTI30K / "test.tsv")
    assert [data.num_rows(split) for split in ("train", "val")] == [1014, 1000]
