"""Words with tags that every installation has: lines of Python, whose names have their role for a tag."""

import ast
import io
import random
import tokenize
import warnings
from collections.abc import Iterator
from typing import Any

from lightning_distill.arguments import integer, typed
from lightning_distill.data.embedded import PACKAGES, root_of, source_files

_Place = tuple[int, int]
_LEFT_OUT = {
    *(tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER),
    *(getattr(tokenize, name, None) for name in ("FSTRING_MIDDLE", "FSTRING_END")),  # from Python 3.12 on
}
_STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_START", None)}
_FEWEST, _MOST = 6, 48  # words of a row


@typed
def source_names(max_rows: int = 4000, *, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """Collect statements of the installed packages' sources, each name tagged with its role.

    The sources are read and parsed, never imported or run. A name has the role that it was given last in its file:
    argument, attribute, class, function, module (what an import brings in) or variable. Names of Python's own are
    ``O``, as are words that are no names. A dotted module is one entity of several words. Strings are left empty and
    comments left out. The rows depend on the versions installed and on the seed.

    Args:
        max_rows: at most this many statements of 6 to 48 words, each once.
        seed: seed of the files chosen and of the order.

    Returns:
        Rows (words, tags), shuffled.

    Raises:
        ValueError: ``max_rows`` is not positive.

    Example:
        >>> rows = source_names(200)
        >>> len(rows), sorted({tag for _, tags in rows for tag in tags})[:3]
        (200, ['B-argument', 'B-attribute', 'B-class'])
    """
    integer("max_rows", max_rows, 1)
    share = -(-max_rows // len(PACKAGES))
    rows: dict[tuple[str, ...], list[str]] = {}
    for package in PACKAGES:
        wanted = len(rows) + share
        for file in source_files(root_of(package), random.Random(f"{seed} {package}")):
            for words, tags in _statements(file.read_text(encoding="utf-8", errors="replace")):
                if len(rows) < wanted:
                    rows.setdefault(tuple(words), tags)
            if len(rows) == wanted:
                break
    shuffled = [(list(words), tags) for words, tags in rows.items()]
    random.Random(seed).shuffle(shuffled)
    return shuffled[:max_rows]


def _statements(source: str) -> Iterator[tuple[list[str], list[str]]]:
    """The words of each logical line, and their tags."""
    if not source.isascii():
        return  # ast counts bytes and tokenize letters
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of the sources that are read
            roles = _roles(ast.parse(source))
        words: list[str] = []
        tags: list[str] = []
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NEWLINE:
                if _FEWEST <= len(words) <= _MOST:
                    yield words, tags
                words, tags = [], []
            if token.type in _LEFT_OUT:
                continue
            words.append('""' if token.type in _STRINGS else token.string)
            tags.append(_tag(words, tags, roles.get(token.start)))
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError):
        return  # not Python of this version


def _tag(words: list[str], tags: list[str], role: str | None) -> str:
    """The tag of the last word, of which there is none yet; the parts of a dotted module are one entity."""
    imports, after_module = words[0] in ("import", "from"), tags[-1:] in (["B-module"], ["I-module"])
    if imports and after_module and "." in (words[-1], words[-2]):
        return "I-module"
    return f"B-{role}" if role else "O"


def _roles(tree: ast.AST) -> dict[_Place, str]:
    """The role of the names of a file, by the line and column where each begins."""
    given: dict[str, str] = {}  # the role of a name, where it gets one
    found: dict[_Place, str] = {}
    loads: list[tuple[_Place, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            loads.append(((node.lineno, node.col_offset), node.id))
        for place, name, role in _named(node):
            found[place] = role
            if role != "attribute":
                given[name] = role
    return {**{place: given[name] for place, name in loads if name in given}, **found}


def _named(node: Any) -> Iterator[tuple[_Place, str, str]]:
    """Where a node names something, what, and the role it gives."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        kind, words = {
            ast.FunctionDef: ("function", "def "),
            ast.AsyncFunctionDef: ("function", "async def "),
            ast.ClassDef: ("class", "class "),
        }[type(node)]
        yield (node.lineno, node.col_offset + len(words)), node.name, kind
    elif isinstance(node, ast.arg | ast.keyword) and node.arg is not None:
        yield (node.lineno, node.col_offset), node.arg, "argument"
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield (node.lineno, node.col_offset + len("from ")), node.module.partition(".")[0], "module"
    elif isinstance(node, ast.alias) and node.name != "*":
        yield (node.lineno, node.col_offset), node.name.partition(".")[0], "module"
        if node.asname:
            yield (node.end_lineno or 0, (node.end_col_offset or 0) - len(node.asname)), node.asname, "module"
    elif isinstance(node, ast.Attribute):
        yield (node.end_lineno or 0, (node.end_col_offset or 0) - len(node.attr)), node.attr, "attribute"
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield (node.lineno, node.col_offset), node.id, "variable"
