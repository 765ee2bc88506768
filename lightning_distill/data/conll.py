"""Files of one token a line, as the shared tasks of CoNLL have them."""

from collections.abc import Iterator
from pathlib import Path

from lightning_distill.arguments import typed
from lightning_distill.data.readers import check_file, numbered_lines
from lightning_distill.data.table import Table, one_line, shown

#: The endings of these files.
CONLL_ENDINGS = (".bio", ".conll", ".conllu", ".iob", ".iob2", ".txt")
#: The column that holds the line of each token.
LINES = "lines of the tokens"


@typed
def read_conll(
    path: str | Path, tokens: str = "tokens", tags: str = "tags", fields: tuple[int, int] = (0, -1)
) -> Table:
    r"""Read sentences of one token a line, with an empty line after each.

    The fields of a line are parted by tabs, where the first line has one, else by white space. In a file with tabs a
    line of one field that begins with ``#`` is a comment. Lines that begin with ``-DOCSTART-`` begin a document and are
    no tokens.

    Args:
        path: the file, UTF-8, which may be packed as gz.
        tokens: the name of the column of tokens that is made.
        tags: the name of the column of tags.
        fields: the numbers of the two fields, from 0; -1 is the last one.

    Returns:
        A row a sentence: its tokens, its tags, and the line of each token in a column :data:`LINES`.

    Raises:
        ValueError: the file is missing or has no tokens, or a line has an empty field or not as many as the first.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "train.conll"
        >>> _ = file.write_text("New\tB-place\nYork\tI-place\n\nGood\tO\n")
        >>> table = read_conll(file)
        >>> table.columns["tokens"], table.columns["tags"], table.lines
        ([['New', 'York'], ['Good']], [['B-place', 'I-place'], ['O']], [1, 4])
    """
    path = Path(path)
    check_file(path)
    columns: dict[str, list[list[object]]] = {tokens: [], tags: [], LINES: []}
    begins = True
    for number, token, tag in _tagged(path, fields):
        if token is None:
            begins = True
            continue
        for name, value in ((tokens, token), (tags, tag), (LINES, number)):
            columns[name] += [[value]] if begins else []
            if not begins:
                columns[name][-1].append(value)
        begins = False
    if not columns[tokens]:
        raise ValueError(one_line(f"{path}: the file has no tokens"))
    return Table(str(path), columns, [lines[0] for lines in columns[LINES]])  # type: ignore[misc]


def _tagged(path: Path, fields: tuple[int, int]) -> Iterator[tuple[int, str | None, str]]:
    """Line, token and tag of each line of a file; no token between sentences."""
    width, tab = 0, False
    for number, line in numbered_lines(path):
        line = line.rstrip("\r\n")
        if not line.strip() or line.startswith("-DOCSTART-"):
            yield number, None, ""
            continue
        if not width:
            tab = "\t" in line
        found = line.split("\t") if tab else line.split()
        if tab and len(found) == 1 and line.startswith("#"):
            continue
        width = width or len(found)
        if len(found) != width:
            raise ValueError(one_line(f"{path}:{number}: {len(found)} fields where the first line has {width}"))
        if not all(-width <= field < width for field in fields) or width < 2:
            raise ValueError(
                one_line(f"{path}:{number}: no fields {fields[0]} and {fields[1]} in {shown(line)}, which has {width}")
            )
        token, tag = (found[field].strip() for field in fields)
        if not token or not tag:
            raise ValueError(one_line(f"{path}:{number}: an empty {'tag' if token else 'token'} in {shown(line)}"))
        yield number, token, tag
