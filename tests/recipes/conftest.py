"""Data and a teacher that a recipe trains on in a second."""

import functools
from pathlib import Path

import pytest

import lightning_distill.cli.embedded
import lightning_distill.cli.language
from lightning_distill import measure
from lightning_distill.data import embedded, language, text
from tests.helpers.models import bert
from tests.helpers.text import write_sentiment, write_tokenizer

_times, _corpus = measure._times, functools.cache(embedded.embedded_corpus)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time each batch once, and read an embedded corpus of few rows once for all: these have tests of their own."""
    monkeypatch.setattr(measure, "_times", lambda models, batches, repeats, *rest: _times(models, batches, 1, *rest))
    for module in (language, text):
        monkeypatch.setattr(module, "embedded_corpus", _corpus)
    for command in (lightning_distill.cli.embedded, lightning_distill.cli.language):
        monkeypatch.setattr(command, "_ROWS_PER_CLASS", 60)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A fine-tuned teacher of four layers and its data, as flags of a run of one epoch."""
    tokenizer = write_tokenizer(tmp_path / "teacher")
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    bert(layers=4, vocab_size=len(tokenizer), max_position_embeddings=64, **names).save_pretrained(tmp_path / "teacher")
    flags = [f"--model.teacher={tmp_path / 'teacher'}", f"--output_dir={tmp_path / 'out'}", "--trainer.max_epochs=1"]
    for index, split in enumerate(("train", "val", "test")):
        flags.append(f"--data.{split}_file={write_sentiment(tmp_path / f'{split}.tsv', seed=index)}")
    return [*flags, "--data.batch_size=8", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
