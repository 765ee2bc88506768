"""Rules that hold for every line of the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Loaders of the library itself, which take no code from anywhere.
OWN = ("EarlyExitModel", "DistillationModule", "TextClassificationData", "LanguageModelData", "CifarResNet")
FILES = sorted(
    path
    for folder in ("lightning_distill", "callbacks", "recipes", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if "callbacks" not in path.relative_to(ROOT).parts[1:]
)


def loads(tree: ast.AST) -> Iterator[ast.Call]:
    """Every call of a function of transformers that could run code beside a model."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        named = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        auto = named.startswith("Auto") or named == "pipeline"
        loading = node.func.attr == "from_pretrained" or (auto and node.func.attr == "from_config")
        if (loading and named not in OWN) or node.func.attr == "pipeline":
            yield node


def test_no_load_runs_code_or_asks_whether_to() -> None:
    found = [(path, call) for path in FILES for call in loads(ast.parse(path.read_text()))]
    assert len(found) >= 5
    for path, call in found:
        trusted = [keyword.value for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        says_no = len(trusted) == 1 and isinstance(trusted[0], ast.Constant) and trusted[0].value is False
        assert says_no, f"{path.relative_to(ROOT)}:{call.lineno}: trust_remote_code=False"


def test_nothing_is_unpickled_but_tensors_and_primitives() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = getattr(node.func.value, "id", "")
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert owner not in ("pickle", "dill", "joblib") or node.func.attr not in ("load", "loads"), where
            if (owner, node.func.attr) == ("torch", "load"):
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                value = keywords.get("weights_only")
                assert isinstance(value, ast.Constant), where
                assert value.value is True, where


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("transformers.AutoConfig.from_pretrained(folder)", True),
        ("AutoTokenizer.from_pretrained(folder, trust_remote_code=ask)", True),
        ("architecture.from_pretrained(folder, **options)", True),
        ("AutoModel.from_config(config)", True),
        ("EarlyExitModel.from_pretrained(folder)", False),
    ],
)
def test_the_rule_sees_what_it_should(line: str, caught: bool) -> None:
    assert bool(list(loads(ast.parse(line)))) is caught
