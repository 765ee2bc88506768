"""Sentences whose words have a tag each: named entities, parts of speech, roles of names."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from lightning_distill.arguments import integer, one_of, typed
from lightning_distill.data.classes import check_class_weights
from lightning_distill.data.conll import CONLL_ENDINGS, LINES, read_conll
from lightning_distill.data.embedded import train_tokenizer
from lightning_distill.data.progress import progress
from lightning_distill.data.readers import kind_of
from lightning_distill.data.rows import RowData
from lightning_distill.data.source_names import source_names
from lightning_distill.data.table import Table, shown
from lightning_distill.data.tokenized import FlatRows
from lightning_distill.models.batch import IGNORE_INDEX

_BIO = re.compile(r"(?:[BI]-.+|O)", re.DOTALL)


@typed
class TokenClassificationData(RowData):
    """Sentences whose words have a tag each, for a Trainer.

    A word is cut into pieces by the tokenizer; its first piece has the label of its tag, the others have none (-100).
    Tags that are all ``O``, ``B-...`` or ``I-...`` name entities, and are held to what BIO says: an entity begins with
    B, and goes on with I of the same kind.

    A batch is a dict of ``input_ids``, ``attention_mask`` and, where the tokenizer makes them, ``token_type_ids``, and
    ``labels``, each ``[B, T]`` int64, with -100 where there is no label.

    Args:
        token_column: the column of words, a list of them a row.
        tag_column: the column of tags, a list of as many: names, or numbers of classes.
        conll_fields: in a file of one token a line (``.conll``, ``.txt`` ...), the numbers of the fields of the token
            and of its tag, from 0; -1 is the last one.
        max_length: longer rows are cut to this many tokens, or split, see ``stride``.
        stride: tokens that two pieces of a long row have in common, so that no word lacks context; each word has its
            label in one of them alone. None: what is too long is cut, and its words are lost.
        label_all_pieces: whether each piece of a word has its label, not the first alone.
        bio: what becomes of an I where no entity of its kind goes on: ``"refuse"`` it, ``"repair"``: it begins one, as
            the scorers of CoNLL and files of the older scheme IOB1 have it, or ``"accept"`` it as it is.
        class_weights: a weight for each class, in the order of ``label_names``, or ``"balanced"``.
        **rows: see :class:`RowData`; files may be of one token a line, too.

    Raises:
        ValueError: an argument is out of range, or a file is wrong; errors about files name file and line.

    Example:
        >>> rows = [(["New", "York", "is", "big"], ["B-place", "I-place", "O", "O"]), (["It", "is"], ["O", "O"])]
        >>> tokenizer = train_tokenizer(["new york is big it"], vocab_size=60)
        >>> data = TokenClassificationData.from_rows(rows * 4, tokenizer=tokenizer, batch_size=6)
        >>> data.setup("fit")
        >>> data.label_names, data.rows("train")[0]
        (['B-place', 'I-place', 'O'], (['New', 'York', 'is', 'big'], ['B-place', 'I-place', 'O', 'O']))
    """

    task = "token_classification"

    def __init__(
        self,
        token_column: str = "tokens",
        tag_column: str = "tags",
        conll_fields: tuple[int, int] = (0, -1),
        max_length: int = 128,
        stride: int | None = None,
        label_all_pieces: bool = False,
        bio: Literal["refuse", "repair", "accept"] = "refuse",
        class_weights: Literal["balanced"] | list[float] | None = None,
        **rows: Any,
    ) -> None:
        super().__init__(**rows)
        integer("max_length", max_length, 1)
        if stride is not None:
            integer("stride", stride, 0)
            if stride >= max_length:
                raise ValueError(
                    f"Expected argument `stride` to be below `max_length`, which is {max_length}, but got {stride}"
                )
        one_of("bio", bio, ("refuse", "repair", "accept"))
        check_class_weights(class_weights, False, self.task)
        if token_column == tag_column:
            raise ValueError(
                f"Expected argument `tag_column` to be another one than `token_column`, but got {tag_column!r}"
            )
        self.columns, self.label_column = [token_column, tag_column], tag_column
        self.token_column, self.tag_column, self.conll_fields = token_column, tag_column, conll_fields
        self.max_length, self.stride, self.label_all_pieces, self.bio = max_length, stride, label_all_pieces, bio
        self._class_weights = class_weights

    @classmethod
    def embedded(
        cls, *, max_rows: int = 4000, vocab_size: int = 4000, seed: int = 0, **kwargs: Any
    ) -> "TokenClassificationData":
        """Make it of lines of the installed packages' sources, whose names have their role for a tag.

        Args:
            max_rows: as for :func:`lightning_distill.data.source_names.source_names`; a tenth of the rows is for
                validation, a tenth for test.
            vocab_size: number of tokens of the tokenizer, which is trained on them on the spot.
            seed: seed of the rows and of the order of the batches.
            **kwargs: as for the class.
        """
        rows = source_names(max_rows, seed=seed)
        tenth = len(rows) // 10
        train, val, test = rows[2 * tenth :], rows[:tenth], rows[tenth : 2 * tenth]
        tokenizer = train_tokenizer([" ".join(words) for words, _ in train], vocab_size)
        return cls.from_rows(train, val, test, tokenizer=tokenizer, seed=seed, **kwargs)

    def read(self, path: Path) -> Table:
        """Read a file of one token a line, or of one sentence a row."""
        if kind_of(path) in CONLL_ENDINGS:
            return read_conll(path, self.token_column, self.tag_column, self.conll_fields)
        return super().read(path)

    def rows(self, split: Literal["train", "val", "test"]) -> list[tuple[list[str], list[str]]]:
        """The words of each row of a split and the names of their classes, in the order of its file."""
        table = self._tables[split]
        words, names = self._words(table), self.label_names
        ids = iter(self.label_ids(table))
        return [(row, [names[next(ids)] for _ in row]) for row in words]

    # -- what a row holds ------------------------------------------------------------------------------------------

    def _words(self, table: Table) -> list[list[str]]:
        for row, words in enumerate(table.columns[self.token_column]):
            if not isinstance(words, list | tuple):
                problem = f"column {self.token_column!r} holds {shown(words)}, which is not a list"
                raise table.error(row, problem)
            if not words:
                raise table.error(row, f"no words in {self.token_column!r}")
            for place, word in enumerate(words):
                if not isinstance(word, str) or not word.strip():
                    problem = f"word {place} of column {self.token_column!r} is {shown(word)}, expected text"
                    raise table.error(row, problem)
        return table.columns[self.token_column]

    def label_table(self, table: Table) -> Table:
        """The tag of each word, in its line; entities as BIO has them."""
        tags = table.explode(self.tag_column)
        sizes = [len(words) for words in self._words(table)]
        for row, (size, found) in enumerate(zip(sizes, table.columns[self.tag_column], strict=True)):
            if len(found) != size:
                raise table.error(row, f"{len(found)} tags in {self.tag_column!r} for {size} words")
        if (lines := table.columns.get(LINES)) is not None:
            tags = replace(tags, lines=list(chain.from_iterable(lines)))
        names = self._given_label_names or table.class_names.get(self.tag_column) or []
        values = [_named(value, names) for value in tags.columns[self.tag_column]]
        if self.bio == "accept" or not all(
            isinstance(value, str) and _BIO.fullmatch(value) for value in _different(values)
        ):
            return tags
        return replace(tags, columns={self.tag_column: self._as_bio(tags, values, sizes)})

    def _as_bio(self, table: Table, tags: list[str], sizes: Sequence[int]) -> list[str]:
        """Tags whose entities begin with B; what does not is refused, or repaired."""
        tags, begins = list(tags), {0, *accumulate(sizes)}
        for place, tag in enumerate(tags):
            before = "O" if place in begins else tags[place - 1]
            if tag[0] != "I" or before[1:] == tag[1:]:
                continue
            if self.bio == "refuse":
                allowed = " or ".join(dict.fromkeys(("'O'", "'B-...'", f"'I{before[1:]}'" if before != "O" else "'O'")))
                where = "at the beginning of a row" if place in begins else f"after {before!r}"
                raise table.error(
                    place,
                    f"the tag {tag!r} {where}, where {allowed} may be; an entity begins with B. Pass bio='repair' to "
                    "begin one there, as the scorers of CoNLL do, or bio='accept' to learn the tags as they are",
                )
            tags[place] = f"B{tag[1:]}"
        return tags

    # -- tokens ----------------------------------------------------------------------------------------------------

    def dataset_of(self, table: Table) -> "TokenizedWords":
        """The words of a table in pieces, and the labels of their tags."""
        words, ids = self._words(table), iter(self.label_ids(table))
        labels = [[next(ids) for _ in row] for row in words]
        return TokenizedWords(
            words, labels, self._load_tokenizer(), self.max_length, self.stride, self.label_all_pieces, table.name
        )


def _named(value: Any, names: Sequence[str]) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return names[value] if whole and 0 <= value < len(names) else value


def _different(values: Sequence[Any]) -> set[Any]:
    """The different values; None stands for those that are neither text nor numbers."""
    return {value if isinstance(value, str | int | float) else None for value in values}


class TokenizedWords(FlatRows):
    """Rows of words as token ids, and the label of each word at its first piece.

    Args:
        words: the words of each row.
        labels: the class of each word.
        tokenizer: makes the tokens.
        max_length: the longest row.
        stride: see :class:`TokenClassificationData`.
        label_all_pieces: see there.
        name: what the rows are called where progress is shown.

    Attributes:
        note: what is said of the words that are cut off, or that the tokenizer makes nothing of.

    Raises:
        ValueError: the tokenizer does not say which word a token is of.

    Example:
        >>> from lightning_distill.data import train_tokenizer
        >>> tokenizer = train_tokenizer(["new york"], vocab_size=20)
        >>> rows = TokenizedWords([["new", "y"]], [[1, 2]], tokenizer, max_length=16)
        >>> tokenizer.convert_ids_to_tokens(rows[0]["input_ids"].tolist()), rows[0]["labels"].tolist()
        (['[CLS]', 'n', '##ew', 'y', '[SEP]'], [-100, 1, -100, 2, -100])
    """

    def __init__(
        self,
        words: Sequence[Sequence[str]],
        labels: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        stride: int | None = None,
        label_all_pieces: bool = False,
        name: str = "the rows",
    ) -> None:
        fields: dict[str, list[int]] = {}
        lengths: list[int] = []
        missing = 0
        options = {"truncation": True, "max_length": max_length, "is_split_into_words": True}
        for begin in progress(range(0, len(words), 1000), f"Tokenising {name}", unit="k rows"):
            part = [list(row) for row in words[begin : begin + 1000]]
            encoded = _encoded(tokenizer, part, return_attention_mask=False, **options, **_split(stride))
            rows = encoded.pop("overflow_to_sample_mapping", range(len(part)))
            seen: dict[int, set[int]] = defaultdict(set)
            encoded["labels"] = [
                _piece_labels(encoded.word_ids(place), labels[begin + row], seen[row], label_all_pieces)
                for place, row in enumerate(rows)
            ]
            for field, values in encoded.items():
                fields.setdefault(field, []).extend(chain.from_iterable(values))
            lengths += map(len, encoded["input_ids"])
            missing += sum(map(len, part)) - sum(map(len, seen.values()))
        super().__init__({field: torch.tensor(values, dtype=torch.int32) for field, values in fields.items()}, lengths)
        self.note = (
            f"{missing} of {sum(map(len, words))} words have no token: they are beyond {max_length} tokens, or nothing "
            "to the tokenizer"
            if missing
            else ""
        )


def _split(stride: int | None) -> dict[str, Any]:
    return {} if stride is None else {"stride": stride, "return_overflowing_tokens": True}


def _encoded(tokenizer: PreTrainedTokenizerBase, words: list[list[str]], **options: Any) -> Any:
    if not tokenizer.is_fast:
        raise ValueError(
            f"Expected argument `tokenizer` to say which word each token is of, but a `{type(tokenizer).__name__}` is "
            "written in Python and does not. Load the fast one of its model"
        )
    return tokenizer(words, **options)


def _piece_labels(word_ids: Sequence[int | None], labels: Sequence[int], seen: set[int], all_pieces: bool) -> list[int]:
    """The label of each token: of a word's first piece, unless another part of the row has had the word."""
    earlier, found = set(seen), []
    for place, word in enumerate(word_ids):
        first = place == 0 or word != word_ids[place - 1]
        has_label = word is not None and word not in earlier and (first or all_pieces)
        found.append(labels[word] if has_label and word is not None else IGNORE_INDEX)
        if word is not None:
            seen.add(word)
    return found
