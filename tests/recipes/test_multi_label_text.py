"""Rows of several labels in the recipes of text: through every step, and what is wrong in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.helpers.models import bert
from tests.helpers.recipes import OF_A_FEW_ROWS, load_recipe, refusal, summary
from tests.helpers.text import sentiment, write_tokenizer

pytestmark = [
    *OF_A_FEW_ROWS,
    pytest.mark.filterwarnings("ignore:Expected calibration data that can promise"),  # of a few rows, too
]


@pytest.fixture
def labelled(tmp_path: Path) -> list[str]:
    """An encoder that is to be trained first, and sentences of none, one or two labels, as flags."""
    tokenizer = write_tokenizer(tmp_path / "encoder")
    encoder = bert(layers=4, vocab_size=len(tokenizer), max_position_embeddings=64).bert
    encoder.save_pretrained(tmp_path / "encoder")
    rows = [(text, ["calm", "", "calm,loud", "loud", "odd"][i % 5]) for i, (text, _) in enumerate(sentiment(40))]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *("\t".join(row) for row in rows)]))
    lists = [{"sentence": text, "label": [name for name in field.split(",") if name]} for text, field in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lists)))
    return [
        f"--model.teacher={tmp_path / 'encoder'}", "--model.finetune_teacher=true", "--trainer.max_epochs=1",
        "--model.teacher_epochs=1", "--data.batch_size=8", f"--output_dir={tmp_path / 'out'}",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def test_a_field_of_labels(labelled: list[str], tmp_path: Path, capsys: Any) -> None:
    main, data = load_recipe("distilbert"), f"--data.train_file={tmp_path / 'train.tsv'}"
    more = ["--data.class_weights=balanced", "--metric=macro_f1,exact_match", "--model.baseline=true", "--gptq.bits=8"]
    main([*labelled, data, "--data.label_separator=,", *more])
    found = summary(tmp_path)
    assert found["student"]["metric_name"] == "macro_f1"
    assert 0 <= found["gptq"]["metric"] <= 1
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student")
    assert student.config.problem_type == "multi_label_classification"
    assert student.config.label2id == {"calm": 0, "loud": 1, "odd": 2}
    assert student.config.num_hidden_layers == 2
    # What was written is a teacher, whose labels are the data's, from lists as well.
    again = [flag for flag in labelled if "teacher" not in flag]
    lists = [f"--data.train_file={tmp_path / 'train.jsonl'}", "--data.task=multi_label"]
    own = [f"--model.teacher={tmp_path / 'out' / 'student'}", f"--output_dir={tmp_path / 'second'}"]
    main([*again, *lists, *own])
    assert (tmp_path / "second" / "student" / "config.json").exists()
    # A teacher of one class a row is none.
    assert "--data.task multi_label" in refusal(main, [*again, *lists[:1], *own], capsys)
    config = json.loads((tmp_path / "out" / "student" / "config.json").read_text())
    config["problem_type"] = "single_label_classification"
    (tmp_path / "out" / "student" / "config.json").write_text(json.dumps(config))
    said = refusal(main, [*again, *lists, *own], capsys)
    assert "the data ask for multi_label, and the teacher was made for classification" in said


def test_ramps_of_several_labels(labelled: list[str], tmp_path: Path) -> None:
    data = [f"--data.train_file={tmp_path / 'train.jsonl'}", "--data.task=multi_label", "--model.ramp_epochs=1"]
    load_recipe("fastbert")([*labelled, *data, "--model.max_drop=0.95"])
    found = summary(tmp_path)
    assert found["teacher"]["metric_name"] == "macro_f1"
    assert found["early_exit"]["guarantee"]["holds"]
