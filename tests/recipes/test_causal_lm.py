"""The recipe of language models: what it writes, on-policy and sequence-level phases, wrong input."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from lightning_distill.__main__ import main as command
from lightning_distill.cli.report import read_curves
from lightning_distill.data import LanguageModelData, train_causal_tokenizer
from tests.helpers.models import llama
from tests.helpers.recipes import OF_A_FEW_ROWS, TRIAL, load_recipe, refusal, summary
from tests.helpers.text import sentiment

pytestmark = OF_A_FEW_ROWS
MODELS = ("teacher", "student", "student_without_distillation")


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], None]:
    return load_recipe("causal_lm")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A teacher of four layers and its text, as flags of a run of one epoch."""
    texts = [text for text, _ in sentiment(80)]
    tokenizer = train_causal_tokenizer(texts, vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "teacher")
    llama(layers=4, vocab_size=len(tokenizer), max_position_embeddings=48).save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    return [
        f"--model.teacher={tmp_path / 'teacher'}",
        f"--data.text_files={tmp_path / 'text.txt'}",
        f"--output_dir={tmp_path / 'out'}",
        "--data.max_length=48",
        "--trainer.max_epochs=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--generation.prompt_length=4",
        "--generation.max_new_tokens=8",
        "--generation.num_prompts=2",
    ]


def test_summary_student_and_curves(main: Any, flags: list[str], tmp_path: Path, capsys: Any) -> None:
    main(flags)
    found = summary(tmp_path)
    for model in MODELS:
        assert set(found[model]) == {"parameters", "bytes", "perplexity", "agreement", "tokens_per_second"}
        assert (found[model]["agreement"] == 1.0) is (model == "teacher")
        assert found[model]["tokens_per_second"] > 0
    assert found["student"]["parameters"] < found["teacher"]["parameters"]
    ratio = found["student"]["perplexity"] / found["teacher"]["perplexity"]
    assert found["ratios"]["perplexity"] == pytest.approx(ratio, abs=1e-4)
    assert set(found["speculative"]) == {
        "acceptance", "acceptance_before", "acceptance_without_distillation", "speedup", "tokens_per_teacher_call"
    }  # fmt: skip
    assert 0 <= found["speculative"]["acceptance"] <= 1 <= found["speculative"]["tokens_per_teacher_call"]
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")
    assert student.config.num_hidden_layers == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "student")
    assert tokenizer.decode(tokenizer("a warm film")["input_ids"]) == "<s>a warm film</s>"
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "As a draft" in capsys.readouterr().out
    # Perplexity is of all tokens: that of the exported student, token by token.
    data = LanguageModelData(str(tmp_path / "text.txt"), tokenizer=tokenizer, max_length=48)
    data.setup()
    nats = tokens = 0.0
    for row in data.dataset("test"):
        labels = row["labels"][1:]
        inputs = {name: row[name][None] for name in ("input_ids", "position_ids")}
        log_probs = student(**inputs, use_cache=False).logits[0, :-1].detach().log_softmax(-1)[labels != -100]
        nats -= float(log_probs.gather(-1, labels[labels != -100][:, None]).sum())
        tokens += int((labels != -100).sum())
    assert found["student"]["perplexity"] == pytest.approx(2.718281828 ** (nats / tokens), rel=1e-4)


def test_on_policy_and_sequence_level(main: Any, flags: list[str], tmp_path: Path) -> None:
    main([*flags, "--generation.on_policy=0.5", "--trainer.max_epochs=4", "--generation.num_prompts=0"])
    curves = read_curves(tmp_path / "out" / "logs" / "student" / "metrics.csv")
    assert set(curves["train_on_policy"][1]) == {0.0, 1.0}
    baseline = read_curves(tmp_path / "out" / "logs" / "student_without_distillation" / "metrics.csv")
    assert "train_on_policy" not in baseline
    assert "speculative" not in summary(tmp_path)

    main([*flags, "--generation.sequence_level=true", "--model.baseline=false", "--generation.num_prompts=0"])
    (file,) = (tmp_path / "out" / "teacher_text").iterdir()
    assert file.suffix == ".safetensors"
    assert "student_without_distillation" not in summary(tmp_path)


def test_a_student_of_ones_own(main: Any, flags: list[str], tmp_path: Path, capsys: Any) -> None:
    main([*flags, "--model.baseline=false", "--optimizer.lr=0.01"])
    first = summary(tmp_path)
    (tmp_path / "out").rename(tmp_path / "first")
    student = str(tmp_path / "first" / "student")
    # Goes on from there, on its own text.
    main([*flags, f"--model.student={student}", "--model.baseline=false", "--generation.on_policy=1.0"])
    found = summary(tmp_path)
    assert found["speculative"]["acceptance_before"] == first["speculative"]["acceptance"]
    assert found["student"]["parameters"] == first["student"]["parameters"]
    assert found["student"]["perplexity"] != first["student"]["perplexity"]

    (tmp_path / "out").rename(tmp_path / "second")
    larger = llama(vocab_size=2016, max_position_embeddings=48)
    larger.save_pretrained(tmp_path / "padded")
    train_causal_tokenizer([text[::-1] for text, _ in sentiment(80)], vocab_size=300).save_pretrained(
        tmp_path / "other"
    )
    llama(vocab_size=300, max_position_embeddings=48).save_pretrained(tmp_path / "other")
    llama(vocab_size=300, max_position_embeddings=24).save_pretrained(tmp_path / "short")
    for more, message in (
        ([f"--model.student={student}", "--model.num_layers=1"], "leave --model.num_layers out"),
        ([f"--model.student={student}", "--model.layers=last"], "leave --model.layers out"),
        ([f"--model.student={tmp_path / 'nowhere'}"], "`--model.student` to be a folder or hub id"),
        ([f"--model.student={tmp_path / 'padded'}"], "--model.student must read text in the words of --model.teacher"),
        ([f"--model.student={tmp_path / 'other'}"], "--model.student must read text in the words of --model.teacher"),
        ([f"--model.student={tmp_path / 'short'}"], "the student has 24 positions"),
    ):
        assert message in refusal(main, [*flags, *more], capsys)
    alone = [f"--model.student={student}", f"--output_dir={tmp_path / 'out'}"]
    assert "--model.student goes with --model.teacher" in refusal(main, alone, capsys)
    assert not (tmp_path / "out").exists()


def test_a_student_with_a_padded_vocabulary(main: Any, flags: list[str], tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "teacher")
    for folder, words in (("teacher", 1088), ("own", 1088 + 64)):
        tokenizer.save_pretrained(tmp_path / folder)
        llama(vocab_size=words, max_position_embeddings=48).save_pretrained(tmp_path / folder)
    main([*flags, f"--model.student={tmp_path / 'own'}"])
    found = summary(tmp_path)
    assert set(MODELS) < set(found)
    assert 0 <= found["speculative"]["acceptance"] <= 1
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out" / "student").vocab_size == 1088 + 64


def test_a_cache_filled_beforehand(main: Any, flags: list[str], tmp_path: Path, capsys: Any) -> None:
    teacher, text, cache = (str(tmp_path / name) for name in ("teacher", "text.txt", "cache"))
    fill = ["cache", "--teacher", teacher, "--cache.path", cache, "--trainer.accelerator=cpu"]
    fill += ["--data", "lightning_distill.data.LanguageModelData", "--data.text_files", text, "--data.max_length=48"]
    objectives = '[{"class_path": "SoftTarget", "init_args": {"temperature": 1.0}}]'
    command([*fill, "--objectives", objectives])
    rows = int(re.findall(r"process 0: (\d+) rows written", capsys.readouterr().out)[0])
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "cache").iterdir()}
    asked = [*flags, f"--teacher_cache.path={cache}", "--generation.num_prompts=0"]
    main([*asked, "--model.baseline=false"])
    assert rows > 10
    assert {path.name: path.stat().st_size for path in (tmp_path / "cache").iterdir()} == sizes
    # What does not fit is said before the baseline is trained.
    (tmp_path / "out").rename(tmp_path / "first")
    for more, message in (
        (["--teacher_cache.top_k=5"], "`top_k` is 64 and not 5"),
        ([f"--objectives={objectives.replace('1.0', '3.0')}"], "`temperatures` is [1.0] and not [3.0]"),
        (["--generation.on_policy=0.5"], "rows that come again, but got `on_policy` 0.5"),
    ):
        assert message in refusal(main, [*asked, *more], capsys)
    assert not (tmp_path / "out").exists()


def test_embedded_default(main: Any, tmp_path: Path) -> None:
    main([f"--output_dir={tmp_path / 'out'}", *TRIAL, "--generation.num_prompts=1", "--generation.max_new_tokens=4"])
    found = summary(tmp_path)
    assert found["ratios"]["parameters"] < 1
    assert set(MODELS) < set(found)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.max_length=49"], "the teacher has 48 positions"),
        (["--generation.max_new_tokens=45"], "the 48 positions of the model"),
        (["--generation.temperature=0"], "do_sample=False"),
        (["--data.text_files=nowhere.txt"], "nowhere.txt: there is no such file"),
        (["--data.text_files=null"], "go together; one is missing"),
        (["--generation.on_policy=2"], "`on_policy`"),
        (["--generation.on_policy=0.5", '--objectives=[{"class_path": "HardLabel"}]'], "reads the teacher"),
    ],
)
def test_wrong_flags_are_one_line(
    main: Any, flags: list[str], tmp_path: Path, capsys: Any, more: Any, message: str
) -> None:
    assert message in refusal(main, [*flags, *more], capsys)
    assert not (tmp_path / "out").exists()
