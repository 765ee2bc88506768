"""The house is as CONTRIBUTING.md draws it: its rooms, their layers, the size of its files and functions."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "lightning_distill"
MAP = (ROOT / "CONTRIBUTING.md").read_text()
ROOMS = sorted(init.parent for init in LIBRARY.rglob("__init__.py") if init.parent != LIBRARY)
FILES = sorted([*LIBRARY.rglob("*.py"), *(ROOT / "callbacks").glob("*.py")])


def drawn() -> list[str]:
    drawing = re.search(r"<!-- rooms -->\n```text\n(.*?)```", MAP, re.S)
    assert drawing is not None
    return [line.split()[0] for line in drawing.group(1).splitlines()]


def test_the_map_has_the_layers_that_import_linter_keeps() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert drawn() == ["recipes/", *layers]


def test_at_most_eight_files_are_loose() -> None:
    assert len([path for path in LIBRARY.iterdir() if path.is_file()]) <= 8


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(LIBRARY)))
def test_a_room_says_what_belongs_there(room: Path) -> None:
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert said is not None
    sentences = re.findall(r"[^.]{20,}\.(?:\s|$)", said)
    assert len(sentences) >= 2, f"{room.name}/__init__.py does not say what belongs there and what not"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    lines = path.read_text().splitlines()
    most = {"module.py": 300, "private_names.py": 600}.get(path.name, 400) if path.parent == LIBRARY else 400
    assert len(lines) <= most


def test_the_files_and_tests_that_the_map_names_exist() -> None:
    for name in re.findall(r"`((?:tests|docs|callbacks|recipes|lightning_distill)/[a-z_/.]+)`", MAP):
        assert (ROOT / name).exists(), name


def test_the_glossary_has_its_words_once() -> None:
    words = re.findall(r"^\| ([^|]+) \| [^|]", MAP.partition("## Words")[2], re.M)[1:]
    assert len(words) >= 30
    assert words == sorted(set(words), key=str.lower)
