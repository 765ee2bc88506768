"""A small sentiment task in files, and a tokenizer for it."""

import random
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from lightning_distill.data import train_tokenizer

GOOD, BAD = ("warm", "funny", "bright", "moving"), ("dull", "cold", "empty", "slow")


def sentiment(rows: int = 24, *, seed: int = 0) -> list[tuple[str, int]]:
    """Sentences whose adjectives tell the label."""
    generator = random.Random(seed)
    return [
        (f"a {' and '.join(generator.sample(GOOD if label else BAD, 2))} film , number {i}", label)
        for i, label in enumerate([0, 1] * (rows // 2))
    ]


def write_sentiment(path: Path, rows: int = 24, *, seed: int = 0) -> Path:
    """A tsv with the columns ``sentence`` and ``label``."""
    lines = [f"{text}\t{label}" for text, label in sentiment(rows, seed=seed)]
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return path


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the sentences, saved in a folder."""
    tokenizer = train_tokenizer([text for text, _ in sentiment(100)], vocab_size=80)
    tokenizer.save_pretrained(folder)
    return tokenizer
