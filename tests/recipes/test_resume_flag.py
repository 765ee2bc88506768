"""A recipe that is cut in any of its phases, and goes on with --resume."""

import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distill.cli.report import read_curves
from tests.helpers.recipes import OF_A_FEW_ROWS, load_recipe, summary

pytestmark = [
    *OF_A_FEW_ROWS,
    pytest.mark.forks,
    pytest.mark.filterwarnings("ignore:Expected calibration data that can promise"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]
BREAK = "--trainer.callbacks=[{class_path: tests.helpers.recipes.Break}]"
FLAGS = [BREAK, "--save_every_n_steps=1"]
ALL = ["--model.teacher_epochs=2", "--model.finetune_teacher=true", "--model.baseline=true"]


def cut(main: Callable[[list[str]], None], flags: list[str], phase: str, number: int) -> int | None:
    """Run in a child process that gets a signal in one phase; its exit code."""

    def child() -> None:
        os.environ["BREAK"] = f"{phase}:{int(number)}"
        main(flags)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize(
    ("phase", "number", "code"),
    [
        ("teacher", signal.SIGTERM, 143),
        ("student", signal.SIGKILL, -9),
        ("student_without_distillation", signal.SIGINT, 130),
    ],
)
def test_it_goes_on_in_the_phase_that_was_cut(
    phase: str, number: int, code: int, files: list[str], tmp_path: Path, capsys: Any
) -> None:
    main = load_recipe("distilbert")
    main([*files, *FLAGS, *ALL, f"--output_dir={tmp_path / 'whole'}"])
    assert cut(main, [*files, *FLAGS, *ALL], phase, number) == code
    assert (tmp_path / "out" / "unfinished.yaml").exists()
    capsys.readouterr()
    main([*files, *FLAGS, *ALL, "--resume"])
    said = capsys.readouterr().out
    assert f"Resuming {phase.replace('_', ' ')} from {tmp_path / 'out' / 'checkpoints' / phase}" in said
    assert not (tmp_path / "out" / "unfinished.yaml").exists()
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    for name in ("teacher", "student", "student_without_distillation"):
        one, other = (tmp_path / folder / name / "model.safetensors" for folder in ("whole", "out"))
        assert one.read_bytes() == other.read_bytes(), name
        curves = [read_curves(tmp_path / folder / "logs" / name / "metrics.csv") for folder in ("whole", "out")]
        assert curves[0] == curves[1], name
        for key in ("metric", "agreement"):
            assert summary(tmp_path)[name][key] == whole[name][key]


def test_damaged_and_malicious_checkpoints_are_skipped_and_other_flags_refused(
    files: list[str], tmp_path: Path, capsys: Any
) -> None:
    main = load_recipe("distilbert")
    main([*files, "--resume"])  # nothing there yet: begins
    assert f"Nothing to resume in {tmp_path / 'out'}" in capsys.readouterr().out
    assert cut(main, [*files, *FLAGS], "student", signal.SIGKILL) == -9
    folder = tmp_path / "out" / "checkpoints" / "student"
    whole = (folder / "newest.ckpt").read_bytes()
    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {mark}",)

    (folder / "zz.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "zzz.ckpt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"state_dict": Bomb()}, folder / "zzzz.ckpt")
    with pytest.raises(SystemExit, match="2"):
        main([*files, *FLAGS, "--optimizer.lr=1e-3", "--resume"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "these are others: lr" in error
    with pytest.warns(UserWarning, match="is skipped") as caught:
        main([*files, *FLAGS, "--resume"])
    assert len([w for w in caught if "is skipped" in str(w.message)]) == 3
    assert f"Resuming student from {folder / 'newest.ckpt'}, step 2" in capsys.readouterr().out
    assert not mark.exists()


def test_a_run_begun_anew_puts_the_cut_one_away(files: list[str], tmp_path: Path, capsys: Any) -> None:
    main = load_recipe("distilbert")
    assert cut(main, [*files, *FLAGS], "student", signal.SIGKILL) == -9
    main(files)
    assert "holds a run that was cut" in capsys.readouterr().out
    assert (tmp_path / "out" / "checkpoints.earlier" / "student" / "newest.ckpt").exists()


def test_the_ramps_of_early_exit_go_on_too(files: list[str], tmp_path: Path, capsys: Any) -> None:
    main = load_recipe("fastbert")
    flags = [*files, "--model.ramp_epochs=2", "--model.max_drop=0.95", *FLAGS]
    main([*flags, f"--output_dir={tmp_path / 'whole'}"])
    assert cut(main, flags, "early_exit_student", signal.SIGTERM) == 143
    main([*flags, "--resume"])
    assert "Resuming early exit student from" in capsys.readouterr().out
    for name in ("early_exit_teacher", "early_exit_student"):
        one, other = (tmp_path / folder / name / "ramps.safetensors" for folder in ("whole", "out"))
        assert one.read_bytes() == other.read_bytes(), name
