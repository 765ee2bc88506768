"""Errors of the command line: one line that names the flag, what it may be and what came."""

from pathlib import Path
from typing import Any, Literal

import pytest

from lightning_distill.arguments import typed
from lightning_distill.cli import text_parser


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trainer.max_epochs=1.5"], "--trainer.max_epochs: expected a whole number, but got '1.5'"),
        (["--optimizer.lr=nan"], "--optimizer.lr: expected a finite number, but got 'nan'"),
        (["--trainer.gradient_clip_val=x"], "--trainer.gradient_clip_val: expected a finite number, but got 'x'"),
        (
            ["--data.task=sums"],
            "--data.task: expected one of 'classification', 'multi_label', 'regression', but got 'sums'",
        ),
        (["--objectives=3"], "--objectives: Not a valid subclass of Objective. Got value: 3"),
        (["--objectives=nonsense"], "--objectives: expected the name of a class, but got \"['nonsense']\""),
        (
            ["--trainer.callbacks=EarlyStopping"],
            "--trainer.callbacks: Problem with given class_path 'lightning.pytorch.callbacks.EarlyStopping': the "
            "following arguments are required: monitor",
        ),
        (["--trainer=3"], "--trainer: Unable to load config '3'"),
        (["--optimzer.lr=1"], "unrecognized arguments: --optimzer.lr=1 (did you mean --optimizer.lr?)"),
        (["--objective", "SoftTarget"], "unrecognized arguments: --objective SoftTarget (did you mean --objectives?)"),
        (["--zzz=1"], "unrecognized arguments: --zzz=1; --help lists the flags"),
        (["--model.teach=x"], "unrecognized arguments: --model.teach=x (did you mean --model.teacher?)"),
    ],
)
def test_a_wrong_flag_is_one_line(flags: list[str], said: str, capsys: Any) -> None:
    parser = text_parser("A recipe.", output_dir="runs")
    parser.prog = "recipe"
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(flags)
    assert capsys.readouterr().err == f"recipe: error: {said}\n"


@pytest.mark.parametrize(
    "text", ["trainer: 3", "data: [1]", "model: null", "3", "nonsense: 1", "a: *b", "a: &a [*a]", "[" * 3000, "\x00"]
)
def test_a_wrong_file_of_flags_is_one_line(text: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        text_parser("A recipe.", output_dir="runs").parse_args([f"--config={tmp_path / 'config.yaml'}"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "error: " in error


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--objectives", "SoftTarget"], ["SoftTarget"]),
        (["--objectives=SoftTarget,HardLabel"], ["SoftTarget", "HardLabel"]),
        (["--objectives", "lightning_distill.objectives.HardLabel"], ["HardLabel"]),
        (["--objectives", "[{class_path: SoftTarget, init_args: {temperature: 3}}]"], ["SoftTarget"]),
    ],
)
def test_objectives_are_named_without_brackets(flags: list[str], names: list[str]) -> None:
    parser = text_parser("A recipe.", output_dir="runs")
    made = parser.instantiate(parser.parse_args([*flags, "--seed=3"]))
    assert [type(objective).__name__ for objective in made.objectives] == names
    assert made.seed == 3


@typed
def _takes(pairs: list[tuple[int, int]], kinds: tuple[Literal["qq", "kk"], ...] = ()) -> None:
    """A function of two lists."""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"pairs": ["a"]}, "`pairs` to be a list of a list of a whole number, but got"),
        ({"pairs": [], "kinds": 3}, "`kinds` to be a list of 'qq' or 'kk', but got 3"),
    ],
)
def test_a_list_of_an_argument_says_of_what(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        _takes(**arguments)
