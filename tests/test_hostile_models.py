"""Model folders that are damaged, not whole, or made to do harm: one sentence each, and no memory."""

import resource
from pathlib import Path
from typing import Any

import pytest

from lightning_distill.pretrained import load_pretrained, load_tokenizer
from tests.helpers.hostile import CONFIGS, TOKENIZERS, WEIGHT_FILES, hostile
from tests.helpers.models import bert
from tests.helpers.text import write_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    words = len(write_tokenizer(folder))
    assert words == 80
    bert(vocab_size=words).save_pretrained(folder)
    load_tokenizer(folder, "teacher", load_pretrained(folder))
    return folder


@pytest.mark.parametrize("kind", [*WEIGHT_FILES, *CONFIGS])
def test_a_folder_that_is_no_whole_model_is_refused(
    kind: str, good: Path, tmp_path: Path, caplog: Any, capfd: Any
) -> None:
    folder = hostile(good, (WEIGHT_FILES | CONFIGS)[kind], tmp_path / "mine")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"Expected") as refused:
        load_pretrained(folder, "--model.teacher")
    said = str(refused.value)
    assert "\n" not in said
    assert "mine" in said
    assert len(said) < 800
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
    assert not caplog.records
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_is_not_whole_is_refused(kind: str, good: Path, tmp_path: Path) -> None:
    folder = hostile(good, TOKENIZERS[kind], tmp_path / "mine")
    model = load_pretrained(folder)
    with pytest.raises(ValueError, match=r"Expected") as refused:
        load_tokenizer(folder, "--model.teacher", model)
    said = str(refused.value)
    assert "\n" not in said
    assert "mine" in said
    assert len(said) < 800
