"""Names of other libraries that begin with an underscore: all are in the table, and the installed ones have them."""

import ast
import importlib
import inspect
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_distill
from lightning_distill import private_names
from lightning_distill.private_names import PRIVATE_NAMES, PrivateName

ROOT = Path(lightning_distill.__file__).parent
FILES = sorted(
    file
    for folder in (ROOT, ROOT / "callbacks", ROOT.parent / "recipes")
    for file in folder.glob("*.py" if folder.name == "callbacks" else "**/*.py")
    if "callbacks" not in file.relative_to(folder).parts and file.name != "private_names.py"
)
LISTED = {(row.name, file) for row in PRIVATE_NAMES for file in row.files}
HELP = "Give it a row in lightning_distill/private_names.py with a reason, or use a public name."


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT if file.is_relative_to(ROOT) else ROOT.parent))


def is_private(name: str) -> bool:
    return name.isidentifier() and name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a file gives: to functions, classes and variables, and to attributes of its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def used(tree: ast.AST) -> Iterator[str]:
    """Private names that a file asks for: attributes, imports, and words that could be given to ``getattr``."""
    in_words = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in in_words:
            names = [node.value]
        yield from filter(is_private, names)


# Words in quotes that are no name of an attribute (ends of names, an operator), and one that the language documents.
WORDS = {
    "_with_signals", "_attention_sink", "_vendor", "_fields", "_id", "_like", "_local_scalar_dense",
    "_token_id", "_token_ids", "_token_index",
}  # fmt: skip


def foreign(trees: dict[str, ast.AST]) -> set[tuple[str, str]]:
    """The private names of others that files use, each with the file."""
    ours = {file: set(defined(tree)) for file, tree in trees.items()}
    anywhere = set().union(*ours.values()) - {name for name, _ in LISTED} | WORDS
    return {(name, file) for file, tree in trees.items() for name in used(tree) if name not in anywhere | ours[file]}


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.AST]:
    return {name_of(file): ast.parse(file.read_text()) for file in FILES}


def test_every_private_name_of_others_is_listed(trees: dict[str, ast.AST]) -> None:
    assert len(trees) > 100
    assert sorted(foreign(trees) - LISTED) == [], HELP


def test_every_private_method_of_others_that_a_class_overrides_is_listed() -> None:
    unlisted = defaultdict(set)
    for info in pkgutil.walk_packages(lightning_distill.__path__, "lightning_distill."):
        module = importlib.import_module(info.name)
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == info.name:
                bases = [base for base in kind.__mro__ if not base.__module__.startswith("lightning_distill")]
                written = {name for name, value in vars(kind).items() if inspect.isfunction(value) and is_private(name)}
                for name in written:
                    file = name_of(Path(inspect.getfile(kind)))
                    if any(name in vars(base) for base in bases) and (name, file) not in LISTED:
                        unlisted[file].add(name)
    assert not unlisted, HELP


def test_every_row_is_still_used(trees: dict[str, ast.AST]) -> None:
    names = {(name, file) for file, tree in trees.items() for name in {*used(tree), *defined(tree)}}
    assert sorted(LISTED - names) == [], "Take it out of lightning_distill/private_names.py."


def test_a_new_name_is_found() -> None:
    tree = ast.parse(
        "from lib._parts import _Part\nclass A(_Part):\n    def f(self, x):\n        return x._y + self._z\n"
    )
    assert {name for name, _ in foreign({"new.py": tree})} == {"_parts", "_Part", "_y", "_z"}
    own = ast.parse(
        "class B:\n    def __init__(self):\n        self._z = f'_word'\n    def f(self, x):\n        return x._z\n"
    )
    assert foreign({"own.py": own}) == set()


@pytest.mark.parametrize("row", PRIVATE_NAMES, ids=lambda row: f"{row.owner}.{row.name}")
def test_the_installed_library_has_it(row: PrivateName) -> None:
    pytest.importorskip(row.owner.partition(".")[0].partition(":")[0])
    assert row.why_missing() is None
    gone = row._replace(name=f"{row.name}_as_it_was")
    assert f"has no `{row.owner.replace(':', '.')}.{gone.name}`, which {row.files[0]}" in str(gone.why_missing())


def test_a_name_that_is_gone_is_said_on_import(monkeypatch: pytest.MonkeyPatch) -> None:
    private_names.warn_of_missing_names()  # all are there: no warning, which would be an error here
    gone = PrivateName("torch.nn:Module", "_as_it_was", ("module.py",), "be a module")
    optional = PrivateName("not_installed_here", "_name", ("module.py",), "be a module")
    monkeypatch.setattr(private_names, "PRIVATE_NAMES", [gone, optional])
    with pytest.warns(RuntimeWarning, match=r"^torch .* has no `torch.nn.Module._as_it_was`, which module.py") as said:
        private_names.warn_of_missing_names()
    assert len(said) == 1
