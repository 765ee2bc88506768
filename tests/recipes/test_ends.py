"""Ctrl-C and SIGTERM in every phase of a command: their exit codes, a line that says how to go on, no traceback."""

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_distill import cli
from lightning_distill.__main__ import main as command
from lightning_distill.data import train_causal_tokenizer
from tests.helpers.models import llama
from tests.helpers.recipes import OF_A_FEW_ROWS, load_recipe
from tests.helpers.text import sentiment

pytestmark = [
    *OF_A_FEW_ROWS,
    pytest.mark.forks,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]


def ended(
    main: Any,
    flags: list[str],
    where: str,
    number: int,
    folder: Path,
    *,
    to: Callable[[], int] = os.getpid,
    wait: float = 20.0,
    times: int = 1,
) -> tuple[int | None, str]:
    """Run in a process of its own, with a signal when a function is called; its exit code and stderr.

    Args:
        main: What is run.
        flags: Its flags.
        where: The function, ``module:class.method``, or ``recipe:name`` for what the recipe calls by that name.
        number: The signal.
        folder: For stderr.
        to: The process that gets it.
        wait: Seconds that the function takes after that.
        times: How often it is sent.
    """
    path, _, names = where.partition(":")
    *owners, name = names.split(".")

    def child() -> None:
        os.setsid()
        with (folder / "stderr").open("w") as stream:
            os.dup2(stream.fileno(), 2)
            sys.stderr = os.fdopen(2, "w")
        sent: list[int] = []
        holder: Any = main.__wrapped__.__globals__ if path == "recipe" else importlib.import_module(path)
        for owner in owners:
            holder = getattr(holder, owner)
        original = holder[name] if path == "recipe" else getattr(holder, name)
        cli.dry_run = lambda *_, **__: None  # it is no phase

        def sends(*arguments: Any, **options: Any) -> Any:
            for _ in range(times if not sent and os.environ.get("LOCAL_RANK", "0") == "0" else 0):
                sent.append(number)
                os.kill(to(), number)
                time.sleep(wait)
            return original(*arguments, **options)

        holder.update({name: sends}) if path == "recipe" else setattr(holder, name, sends)
        main(flags)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    return process.exitcode, (folder / "stderr").read_text()


TEXT = [
    "lightning_distill.data:TextClassificationData.setup",
    "lightning_distill.module:DistillationModule.test_step",
    "lightning_distill.module:DistillationModule.export",
    "lightning_distill.callbacks.gptq:quantize",
    "recipe:latency_ms",
    "lightning_distill.cli.report:plot_curves",
]


@pytest.mark.parametrize("where", TEXT)
def test_a_text_recipe(where: str, files: list[str], tmp_path: Path) -> None:
    number = signal.SIGINT if TEXT.index(where) % 2 else signal.SIGTERM
    code, said = ended(load_recipe("distilbert"), [*files, "--gptq.bits=8"], where, number, tmp_path)
    assert code == 128 + number, said
    assert "Go on with: the same command with --resume" in said
    assert "Traceback" not in said


def test_a_validation_ends_first_and_a_second_ctrl_c_does_not_wait(files: list[str], tmp_path: Path) -> None:
    where = "lightning_distill.module:DistillationModule.validation_step"
    flags = [*files, "--trainer.num_sanity_val_steps=0", "--trainer.max_epochs=2", "--trainer.limit_val_batches=1"]
    for times in (1, 2):
        options: dict[str, Any] = {"wait": 0.1, "times": times}
        code, said = ended(load_recipe("distilbert"), flags, where, signal.SIGINT, tmp_path, **options)
        assert code == 130, said
        assert "Traceback" not in said
        saved = tmp_path / "out" / "checkpoints" / "student" / "interrupted.ckpt"
        assert saved.exists() is (times == 1)


def test_early_exit(files: list[str], tmp_path: Path) -> None:
    where = "lightning_distill.early_exit:EarlyExitModel.calibrate"
    flags = [*files, "--model.ramp_training=self_distill"]
    code, said = ended(load_recipe("fastbert"), flags, where, signal.SIGTERM, tmp_path)
    assert code == 143, said
    assert "Stopped by SIGTERM. Go on with: the same command with --resume" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "where", ["recipe:teacher_documents", "recipe:tokens_per_second", "lightning_distill.cli.language:speculative"]
)
def test_a_language_model_that_writes(where: str, tmp_path: Path) -> None:
    texts = [text for text, _ in sentiment(40)]
    tokenizer = train_causal_tokenizer(texts, vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "teacher")
    llama(layers=2, vocab_size=len(tokenizer), max_position_embeddings=48).save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    flags = [
        f"--model.teacher={tmp_path / 'teacher'}", f"--data.text_files={tmp_path / 'text.txt'}", "--data.max_length=48",
        f"--output_dir={tmp_path / 'out'}", "--model.baseline=false", "--generation.sequence_level=true",
        "--generation.prompt_length=4", "--generation.max_new_tokens=4", "--generation.num_prompts=1",
        "--trainer.limit_train_batches=1", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    code, said = ended(load_recipe("causal_lm"), flags, where, signal.SIGINT, tmp_path)
    assert code == 130, said
    assert "Stopped by Ctrl-C. Go on with: the same command with --resume" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("where", "to"),
    [
        ("lightning_distill.module:DistillationModule.test_step", os.getpid),
        ("lightning_distill.module:DistillationModule.test_step", os.getppid),
        ("lightning_distill.module:DistillationModule.on_train_batch_start", os.getppid),
    ],
)
def test_a_run_that_forks(where: str, to: Callable[[], int], files: list[str], tmp_path: Path) -> None:
    flags = [*files, "--trainer.strategy=ddp_fork", "--trainer.devices=2"]
    number = signal.SIGTERM if to is os.getpid else signal.SIGINT
    code, said = ended(load_recipe("distilbert"), flags, where, number, tmp_path, to=to, wait=0.5)
    assert code == 128 + number, said
    assert "Go on with: the same command with --resume" in said
    assert "Traceback" not in said
    if "train" in where:
        assert (tmp_path / "out" / "checkpoints" / "student" / "interrupted.ckpt").exists()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("quantize", "lightning_distill.cli.quantize:quantize"),
        ("quantize", "lightning_distill.cli.quantize:load_pretrained"),
        ("cache", "lightning_distill.module:DistillationModule.teacher_step"),
    ],
)
def test_commands(name: str, where: str, files: list[str], tmp_path: Path) -> None:
    data = str(tmp_path / "train.tsv")
    flags = ["quantize", "--model", str(tmp_path / "teacher"), "--data", data, "--output", str(tmp_path / "out")]
    if name == "cache":
        flags = [
            "cache", "--teacher", str(tmp_path / "teacher"), "--cache.path", str(tmp_path / "cache"),
            "--data=lightning_distill.data.TextClassificationData", f"--data.train_file={data}",
            f"--data.tokenizer={tmp_path / 'teacher'}", "--trainer.accelerator=cpu",
        ]  # fmt: skip
    code, said = ended(command, flags, where, signal.SIGTERM, tmp_path)
    assert code == 143, said
    assert "Stopped by SIGTERM. Go on with: the same command, which" in said
    assert "Traceback" not in said
