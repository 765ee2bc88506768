"""One folder, one run: --resume goes on with the run that is there and with no other, and nobody else is let in."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_distill.cli import run_folder, text_parser
from tests.helpers.recipes import OF_A_FEW_ROWS, load_recipe, refusal, summary
from tests.helpers.text import write_sentiment

pytestmark = [
    *OF_A_FEW_ROWS,
    pytest.mark.forks,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]


def test_a_finished_run_is_gone_on_with_as_it_was_or_not_at_all(files: list[str], tmp_path: Path, capsys: Any) -> None:
    main = load_recipe("distilbert")
    main(files)
    student = tmp_path / "out" / "student" / "model.safetensors"
    weights, found = student.read_bytes(), summary(tmp_path)
    for flag, name, values in (
        ("--seed=1", "seed", "1 and was 0"),
        ("--optimizer.lr=1e-3", "optimizer.lr", "0.001 and was null"),
        ("--data.batch_size=4", "data.batch_size", "4 and was 8"),
        ("--trainer.max_epochs=2", "trainer.max_epochs", "2 and was 1"),
        ("--model.num_layers=1", "model.num_layers", "1 and was null"),
        ("--objectives=SoftTarget", "objectives", "SoftTarget"),
        (f"--data.test_file={write_sentiment(tmp_path / 'other.tsv', seed=7)}", "data.test_file", "other.tsv"),
        ("--trainer.precision=bf16-mixed", "trainer.precision", '"bf16-mixed" and was null'),
    ):
        if flag.startswith("--objectives"):
            flag = "--objectives=[{class_path: lightning_distill.objectives.SoftTarget}]"
        error = refusal(main, [*files, flag, "--resume"], capsys)
        assert f"(--{name} is " in error, error
        assert values in error, error
    assert student.read_bytes() == weights
    assert summary(tmp_path) == found

    other = load_recipe("tinybert")
    assert "holds a run of distilbert, and this is tinybert" in refusal(other, [*files, "--resume"], capsys)
    # What cannot change the result may be another: that is a short list.
    main([*files, "--resume", "--trainer.enable_model_summary=true"])
    assert student.read_bytes() == weights

    teacher = tmp_path / "teacher" / "config.json"
    described = teacher.read_text()
    teacher.write_text(described.replace("{", '{"note": 1,', 1))
    error = refusal(main, [*files, "--resume"], capsys)
    assert f"have changed since: --model.teacher {teacher};" in error
    teacher.write_text(described)
    write_sentiment(tmp_path / "train.tsv", seed=9)
    error = refusal(main, [*files, "--resume"], capsys)
    assert f"have changed since: --data.train_file {tmp_path / 'train.tsv'};" in error
    (tmp_path / "out" / "run.json").write_text("{")
    assert "run.json is damaged" in refusal(main, [*files, "--resume"], capsys)
    (tmp_path / "out" / "run.json").unlink()
    assert "no run.json that says of which run" in refusal(main, [*files, "--resume"], capsys)


def begin(flags: list[str]) -> None:
    """What a recipe does before it trains."""
    config = text_parser(None, output_dir="runs/distilbert").parse_args(flags)
    run_folder.begin_run(config)
    run_folder.end_run(config)


def test_a_file_of_flags_counts_by_its_values(tmp_path: Path) -> None:
    file, flags = tmp_path / "flags.yaml", [f"--output_dir={tmp_path / 'out'}"]
    file.write_text("model: {width: 0.5}\n")
    begin([f"--config={file}", *flags])
    begin(["--model.width=0.5", *flags, "--resume"])  # the same, said otherwise
    file.write_text("model: {width: 1.0}\n")
    with pytest.raises(ValueError, match=r"width \(--model.width is 1.0 and was 0.5\)"):
        begin([f"--config={file}", *flags, "--resume"])
    run_folder._release((tmp_path / "out").resolve())


@pytest.mark.parametrize("flag", ["data.num_workers=2", "trainer.enable_progress_bar=false", "trainer.logger=true"])
def test_what_may_be_another(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin([f"--output_dir={tmp_path / 'out'}"])
    noted = (tmp_path / "out" / "run.json").read_text()
    monkeypatch.chdir(tmp_path)
    begin(["--output_dir=out", f"--{flag}", "--resume"])
    assert (tmp_path / "out" / "run.json").read_text() == noted


def test_earlier_checkpoints_are_kept_each_time(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    for seed in range(3):
        begin([f"--output_dir={out}", f"--seed={seed}"])
        (out / "checkpoints" / "student").mkdir(parents=True)
        (out / "checkpoints" / "student" / f"{seed}.ckpt").touch()
    said = capsys.readouterr().out
    assert f"holds an earlier run. Its checkpoints are now in {out / 'checkpoints.earlier.2'}: this" in said
    for seed, name in enumerate(("checkpoints.earlier", "checkpoints.earlier.2")):
        assert [file.name for file in (out / name / "student").iterdir()] == [f"{seed}.ckpt"]
        assert json.loads((out / name / "run.json").read_text())["flags"]["seed"] == seed
    assert json.loads((out / "run.json").read_text())["flags"]["seed"] == 2


@pytest.mark.filterwarnings("ignore:The checkpoint .*best.ckpt is skipped")  # newer than the others by the damage
def test_a_best_checkpoint_that_cannot_be_read(files: list[str], tmp_path: Path) -> None:
    main = load_recipe("distilbert")
    main(files)
    student = tmp_path / "out" / "student" / "model.safetensors"
    weights = student.read_bytes()
    best = tmp_path / "out" / "checkpoints" / "student" / "best.ckpt"
    best.write_bytes(best.read_bytes()[:-999])
    said = "The checkpoint of the best epoch of student cannot be read: last.ckpt is taken in its place."
    with pytest.warns(UserWarning, match=said):
        main([*files, "--resume"])
    assert student.read_bytes() == weights  # of one epoch
    best.unlink()
    with pytest.warns(UserWarning, match=f"{said} It is gone"):
        found = run_folder.best_weights(best.parent, str(best))
    assert found is not None
    for file in best.parent.iterdir():
        file.unlink()
    with pytest.warns(UserWarning, match="the last step is taken"):
        assert run_folder.best_weights(best.parent, str(best)) is None
    assert run_folder.best_weights(best.parent, "") is None


def test_two_runs_at_once(files: list[str], tmp_path: Path, capsys: Any) -> None:
    main, out = load_recipe("distilbert"), tmp_path / "out"

    def child() -> None:
        run_folder.resume_from.__globals__["newest_checkpoint"] = lambda _: time.sleep(60)
        main([*files, "--resume"])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    while not (out / ".lock.json").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    for flags in (files, [*files, "--resume"]):
        error = refusal(main, flags, capsys)
        assert f"{out} is in use by another run: process {process.pid} on " in error
        assert ", since 20" in error
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    main(files)  # a killed run holds nothing
    assert summary(tmp_path)["seed"] == 0
    assert not (out / ".lock.json").exists()


def test_a_folder_that_cannot_be_written(files: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").write_text("a file")
    assert "--output_dir" in refusal(load_recipe("distilbert"), files, capsys)
    assert (tmp_path / "out").read_text() == "a file"
