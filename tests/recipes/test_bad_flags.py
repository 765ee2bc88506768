"""Flags nobody expects: one line and exit code 2, before anything is written, or a run that ends well."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.recipes import OF_A_FEW_ROWS, load_recipe

pytestmark = [*OF_A_FEW_ROWS, pytest.mark.filterwarnings("ignore")]
FLAGS = [
    "seed", "save_every_n_steps", "resume", "nonsense",
    *(f"data.{name}" for name in ("train_file", "text_columns", "label_column", "batch_size", "max_length", "val_split",
                                  "max_train_rows", "task", "num_workers", "label_names")),
    *(f"model.{name}" for name in ("teacher", "student", "num_layers", "width", "compression_ratio", "layers", "init",
                                   "finetune_teacher", "teacher_epochs", "baseline")),
    *(f"optimizer.{name}" for name in ("name", "lr", "weight_decay", "betas", "eps", "momentum")),
    *(f"lr_scheduler.{name}" for name in ("name", "interval", "warmup", "min_lr_ratio", "monitor")),
    *(f"gradient_clipping.{name}" for name in ("algorithm", "threshold", "per", "decay", "history")),
    *(f"lr_finder.{name}" for name in ("suggestion", "min_lr", "num_steps")),
    *(f"init_policy.{name}" for name in ("policy", "std", "only")),
    *(f"gptq.{name}" for name in ("bits", "group_size", "embedding_bits", "num_samples")),
    *(f"trainer.{name}" for name in ("accelerator", "strategy", "devices", "precision", "callbacks", "plugins",
                                     "accumulate_grad_batches", "gradient_clip_val", "log_every_n_steps")),
    "finite_loss.max_skipped", "objectives", "config",
]  # fmt: skip
VALUES = ["-1", "0", "nan", "inf", "1e999", "nonsense", "[]", "{}", "[1, x]", "{a: 1}", "null", "true", "2.5", "", "'"]


def try_flag(main: Any, files: list[str], out: Path, flag: str, value: str, capsys: Any) -> str:
    """Run with a flag; ``refused`` or ``ran``."""
    arguments = [*files, f"--output_dir={out}", "--trainer.max_steps=1", f"--{flag}={value}"]
    code: Any = 0
    try:
        main(arguments)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err.strip()
    if code == 0:
        assert (out / "summary.json").exists(), (flag, value)
        return "ran"
    assert code == 2, (flag, value, said)
    assert "error:" in said, (flag, value, said)
    assert not (out / "checkpoints").exists(), (flag, value, said)
    return "refused"


@pytest.mark.parametrize("examples", [10, pytest.param(150, marks=pytest.mark.slow)])
def test_odd_flags(examples: int, files: list[str], tmp_path: Path, capsys: Any) -> None:
    main, count, found = load_recipe("distilbert"), iter(range(10_000)), []

    @settings(deadline=None, max_examples=examples, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(flag=st.sampled_from(FLAGS), value=st.sampled_from(VALUES))
    def attempt(flag: str, value: str) -> None:
        found.append(try_flag(main, files, tmp_path / f"out{next(count)}", flag, value, capsys))

    attempt()
    assert "refused" in found
