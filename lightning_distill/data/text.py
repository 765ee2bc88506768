"""Labelled text for training and evaluation, from files, from the hub or from rows in memory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_distill.arguments import integer, one_of, typed
from lightning_distill.data import columns
from lightning_distill.data.classes import check_class_weights
from lightning_distill.data.embedded import embedded_corpus, train_tokenizer
from lightning_distill.data.label_lists import joined_labels, label_lists, one_hot_rows
from lightning_distill.data.module import Split
from lightning_distill.data.rows import RowData
from lightning_distill.data.table import Table, one_line, shown
from lightning_distill.data.tokenized import TokenizedText
from lightning_distill.models.heads import TaskName


@typed
class TextClassificationData(RowData):
    """Labelled sentences, or pairs of sentences, for a Trainer.

    Files are read when they are first asked about (``label_names``, ``rows``), texts are tokenised once, in ``setup``,
    and kept in memory. Training batches hold texts of similar length in a random order and resume in the middle of an
    epoch; see :class:`BucketBatchSampler`. Evaluation batches go from long to short; those for ``predict`` keep the
    order of the file.

    A batch is a dict of ``input_ids``, ``attention_mask`` and, where the tokenizer makes them, ``token_type_ids``, each
    ``[B, T]`` int64, and ``labels``: ``[B]`` int64 for classification, ``[B]`` float32 for regression, and where a row
    has several labels ``[B, L]`` float32, a 0 or 1 for each, all 0 in a row that has none.

    Args:
        train_file: a tsv, csv, json, jsonl (ndjson) or parquet file; tsv and csv with a header. All but parquet may be
            packed, as ``train.tsv.gz``.
        val_file: the validation file; default: a part of the training file, see ``val_split``.
        test_file: the test file; default: the validation rows are the test rows too.
        text_columns: the column of the text, or the two columns of a sentence pair, as a list or as ``"first,second"``.
        label_column: the column of the label, or of lists of labels. Whole numbers are numbered by size, strings by
            alphabet.
        hub_dataset: instead of files: ``"name"``, ``"name/configuration"`` such as ``"glue/sst2"``, or a local folder
            that ``datasets.load_dataset`` understands. Needs ``pip install "lightning-distill[hub]"``.
        label_names: names of the classes in the order of their ids, to follow a teacher's order, or to name the
            numbers 0, 1, ... of the label column.
        tokenizer: a tokenizer, or the name or folder of one; it may be set later, before ``setup``.
        batch_size: rows in a batch of one process.
        max_length: longer texts are cut to this many tokens.
        val_split: the share of the training rows held out when there is no validation file.
        max_train_rows: train on at most this many rows, drawn at random.
        task: ``"classification"``, ``"multi_label"`` for several labels a row, or ``"regression"`` on a column of
            numbers. None: multi_label where there is a ``label_separator``, else classification.
        class_weights: a weight for each class, in the order of ``label_names``, or ``"balanced"``: N / (C n_c) for a
            class of n_c of the N training rows, C being the number of classes. Of several labels a row it is the weight
            where a label is there, ``"balanced"`` the rows without it by those with it. Hand ``data.label_weights`` to
            :class:`lightning_distill.objectives.HardLabel`, as the recipes do.
        balanced: whether an epoch draws all classes equally often; rows of small classes are then repeated and some of
            large ones left out.
        seed: seed of the validation split, of ``max_train_rows`` and of the order of the batches.
        num_workers: worker processes of each dataloader.
        label_separator: what is between the labels of a field that holds several, such as ``","``.

    Raises:
        ValueError: an argument is out of range, or a file is wrong; errors about files name file and line.

    Example:
        >>> rows = [(f"{'good' if i % 2 else 'bad'} film {i}", "pos" if i % 2 else "neg") for i in range(20)]
        >>> tokenizer = train_tokenizer([text for text, _ in rows], vocab_size=40)
        >>> data = TextClassificationData.from_rows(rows, tokenizer=tokenizer, batch_size=6)
        >>> data.setup("fit")
        >>> data.label_names, [len(batch["labels"]) for batch in data.train_dataloader()]
        (['neg', 'pos'], [6, 6, 6])
    """

    task: TaskName = "classification"
    label_column: str

    def __init__(
        self,
        train_file: str | Path | None = None,
        val_file: str | Path | None = None,
        test_file: str | Path | None = None,
        text_columns: list[str] | str = "sentence",
        label_column: str = "label",
        hub_dataset: str | None = None,
        label_names: list[str] | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        batch_size: int = 32,
        max_length: int = 128,
        val_split: float = 0.1,
        max_train_rows: int | None = None,
        task: Literal["classification", "multi_label", "regression"] | None = None,
        seed: int = 0,
        num_workers: int = 0,
        class_weights: Literal["balanced"] | list[float] | None = None,
        balanced: bool = False,
        label_separator: str | None = None,
    ) -> None:
        super().__init__(
            train_file, val_file, test_file, hub_dataset, label_names, tokenizer, batch_size, val_split, max_train_rows,
            seed, num_workers,
        )  # fmt: skip
        self.text_columns = _text_columns(text_columns, label_column)
        integer("max_length", max_length, 1)
        self.task = task or ("classification" if label_separator is None else "multi_label")
        one_of("task", self.task, ("classification", "multi_label", "regression"))
        check_class_weights(class_weights, balanced, self.task)
        if label_separator is not None and (not label_separator or self.task != "multi_label"):
            raise ValueError(
                "Expected argument `label_separator` to be text, beside task='multi_label', but got "
                f"{label_separator!r} beside {self.task!r}"
            )
        self.columns = [*self.text_columns, label_column]
        self.label_column = label_column
        self.max_length = max_length
        self.label_separator = label_separator
        self.balanced = balanced
        self._class_weights = class_weights

    @classmethod
    def embedded(
        cls, *, max_rows_per_class: int = 1300, vocab_size: int = 4000, seed: int = 0, **kwargs: Any
    ) -> "TextClassificationData":
        """Make it of docstrings of the installed packages, with a tokenizer trained on them on the spot.

        Args:
            max_rows_per_class: as for :func:`embedded_corpus`; a tenth of the rows is for validation, a tenth for
                test.
            vocab_size: number of tokens of the tokenizer.
            seed: seed of the rows and of the order of the batches.
            **kwargs: as for the class.
        """
        rows = embedded_corpus(max_rows_per_class, seed=seed)
        tenth = len(rows) // 10
        train, val, test = rows[2 * tenth :], rows[:tenth], rows[tenth : 2 * tenth]
        tokenizer = train_tokenizer([text for text, _ in train], vocab_size)
        return cls.from_rows(train, val, test, tokenizer=tokenizer, seed=seed, **kwargs)

    @property
    def num_labels(self) -> int:
        """Number of classes or labels; 1 for regression."""
        return len(self.label_names) or 1

    def rows(self, split: Split) -> list[tuple[tuple[str, ...], Any]]:
        """The texts of each row of a split, one or two, and its label, in the order of its file.

        A label is the id of its class, a number, or, of several labels a row, the ids of all that it has.
        """
        table = self._tables[split]
        labels: Sequence[Any] = self._labels(table).tolist()
        if self.task == "multi_label":
            labels = [tuple(label for label, there in enumerate(row) if there) for row in labels]
        return list(zip(columns.texts(table, self.text_columns), labels, strict=True))

    def label_table(self, table: Table) -> Table:
        """The labels of each row, one or several, each in its line."""
        if self.task == "multi_label":
            lists = label_lists(table, self.label_column, self.label_separator)
            return replace(table, columns={self.label_column: lists}).explode(self.label_column)
        for row, value in enumerate(table.columns[self.label_column]):
            if isinstance(value, list | tuple):
                problem = f"column {self.label_column!r} holds {shown(value)}, a list, where one label is expected"
                raise table.error(row, f"{problem}; set task to 'multi_label' for several (--data.task multi_label)")
        return table

    def _read_tables(self) -> dict[str, Table]:
        tables = super()._read_tables()
        if self.names_classes and self.label_separator is None:
            _warn_of_joined(tables["train"], self.label_column)
        return tables

    def _labels(self, table: Table) -> Tensor:
        if self.task == "regression":
            return torch.tensor(columns.scores(table, self.label_column))
        ids = self.label_ids(table)
        if self.task == "classification":
            return torch.tensor(ids)
        sizes = map(len, label_lists(table, self.label_column, self.label_separator))
        return one_hot_rows(ids, list(sizes), self.num_labels)

    def dataset_of(self, table: Table) -> TokenizedText:
        """The texts of a table, tokenised, and their labels."""
        tokenizer, texts = self._load_tokenizer(), columns.texts(table, self.text_columns)
        return TokenizedText(texts, self._labels(table), tokenizer, self.max_length, table.name)


def _warn_of_joined(table: Table, column: str) -> None:
    names = {value for value in table.columns[column] if isinstance(value, str)}
    if found := joined_labels(sorted(names)):
        separator, name = found
        said = f"{table.name}: the label {shown(name)} in column {column!r} is made of others"
        advice = f"for several labels a row set label_separator (--data.label_separator {separator!r})"
        rank_zero_warn(one_line(f"{said}; {advice}"), stacklevel=2)


def _text_columns(text_columns: list[str] | str, label_column: str) -> list[str]:
    # "a,b" is what one types; a column whose name has a comma is given as a list.
    found = text_columns.split(",") if isinstance(text_columns, str) else text_columns
    found = [column.strip() for column in found]
    if len(found) not in (1, 2) or not all(found):
        raise ValueError(f"Expected argument `text_columns` to name one or two columns, but got {text_columns!r}")
    if len({*found, label_column}) <= len(found):
        raise ValueError(
            f"Expected argument `text_columns` to name other columns than each other and `label_column`, but got "
            f"{text_columns!r} beside {label_column!r}"
        )
    return found
