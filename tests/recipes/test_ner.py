"""The recipe of taggers: embedded data, files of one token a line, what is wrong in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from lightning_distill.data import TokenClassificationData
from tests.helpers.models import bert
from tests.helpers.recipes import OF_A_FEW_ROWS, load_recipe, refusal, summary
from tests.helpers.text import write_tokenizer

pytestmark = OF_A_FEW_ROWS


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], None]:
    return load_recipe("ner")


@pytest.fixture
def tagged(tmp_path: Path) -> list[str]:
    """An encoder that is to be trained first, and sentences with places, as flags."""
    tokenizer = write_tokenizer(tmp_path / "encoder")
    encoder = bert(layers=4, vocab_size=len(tokenizer), max_position_embeddings=64).bert
    encoder.save_pretrained(tmp_path / "encoder")
    rows = ["a\tO\nwarm\tB-mood\nfilm\tI-mood\n", "dull\tB-mood\nfilm\tO\n", "a\tO\nfilm\tO\n"] * 8
    (tmp_path / "train.conll").write_text("\n".join(rows))
    return [
        f"--model.teacher={tmp_path / 'encoder'}", "--model.finetune_teacher=true", "--trainer.max_epochs=1",
        "--model.teacher_epochs=1", f"--data.train_file={tmp_path / 'train.conll'}", "--data.batch_size=8",
        f"--output_dir={tmp_path / 'out'}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def test_a_tagger_is_made_of_an_encoder(main: Any, tagged: list[str], tmp_path: Path, capsys: Any) -> None:
    main([*tagged, "--metric=macro_f1,accuracy"])
    found = summary(tmp_path)
    assert found["teacher"]["metric_name"] == "macro_f1"
    student = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / "student")
    assert student.config.label2id == {"B-mood": 0, "I-mood": 1, "O": 2}
    assert student.config.num_hidden_layers == 2
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    # What was written is a teacher, whose tags are the data's.
    again = [flag for flag in tagged if "finetune" not in flag and "teacher" not in flag]
    main([*again, f"--model.teacher={tmp_path / 'out' / 'student'}", f"--output_dir={tmp_path / 'second'}"])
    assert (tmp_path / "second" / "student" / "config.json").exists()


def test_without_any_file(main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = TokenClassificationData.embedded
    few = classmethod(lambda cls, **options: embedded(**{**options, "max_rows": 120}))
    monkeypatch.setattr(TokenClassificationData, "embedded", few)
    trial = ["--trainer.max_epochs=1", "--model.teacher_epochs=1", "--trainer.enable_progress_bar=false"]
    main([f"--output_dir={tmp_path / 'out'}", *trial, "--trainer.accelerator=cpu"])
    assert summary(tmp_path)["student"]["metric_name"] == "accuracy"


def test_a_tag_out_of_order_is_one_line(main: Any, tagged: list[str], tmp_path: Path, capsys: Any) -> None:
    with (tmp_path / "train.conll").open("a") as file:
        file.write("\nfilm\tI-mood\n")
    said = refusal(main, tagged, capsys)
    assert "train.conll" in said
    assert "the tag 'I-mood' at the beginning of a row" in said
