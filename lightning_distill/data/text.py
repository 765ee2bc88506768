"""Labelled text for training and evaluation, from files, from the hub or from rows in memory."""

import random
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_distill.arguments import integer, one_of, typed
from lightning_distill.data import columns
from lightning_distill.data.classes import check_class_weights, class_weights_of
from lightning_distill.data.embedded import embedded_corpus, train_tokenizer
from lightning_distill.data.hub import read_hub_dataset
from lightning_distill.data.module import Split, TextData, check_sources, hold_out
from lightning_distill.data.readers import read_table
from lightning_distill.data.table import Table
from lightning_distill.data.tokenized import TokenizedText, pad_rows
from lightning_distill.models.class_names import are_placeholders

Row = tuple[Any, ...]


@typed
class TextClassificationData(TextData):
    """Labelled sentences, or pairs of sentences, for a Trainer.

    Files are read when they are first asked about (``label_names``, ``rows``), texts are tokenised once, in ``setup``,
    and kept in memory. Training batches hold texts of similar length in a random order and resume in the middle of an
    epoch; see :class:`BucketBatchSampler`. Evaluation batches go from long to short; those for ``predict`` keep the
    order of the file.

    A batch is a dict of ``input_ids``, ``attention_mask`` and, where the tokenizer makes them, ``token_type_ids``, each
    ``[B, T]`` int64, and ``labels`` ``[B]``, int64 for classification, float32 for regression.

    Args:
        train_file: a tsv, csv, json, jsonl (ndjson) or parquet file; tsv and csv with a header. All but parquet may be
            packed, as ``train.tsv.gz``.
        val_file: the validation file; default: a part of the training file, see ``val_split``.
        test_file: the test file; default: the validation rows are the test rows too.
        text_columns: the column of the text, or the two columns of a sentence pair, as a list or as ``"first,second"``.
        label_column: the column of the label. Whole numbers are numbered by size, strings by alphabet.
        hub_dataset: instead of files: ``"name"``, ``"name/configuration"`` such as ``"glue/sst2"``, or a local folder
            that ``datasets.load_dataset`` understands. Needs ``pip install "lightning-distill[hub]"``.
        label_names: names of the classes in the order of their ids, to follow a teacher's order, or to name the
            numbers 0, 1, ... of the label column.
        tokenizer: a tokenizer, or the name or folder of one; it may be set later, before ``setup``.
        batch_size: rows in a batch of one process.
        max_length: longer texts are cut to this many tokens.
        val_split: the share of the training rows held out when there is no validation file.
        max_train_rows: train on at most this many rows, drawn at random.
        task: ``"classification"``, or ``"regression"`` on a column of numbers.
        class_weights: a weight for each class, in the order of ``label_names``, or ``"balanced"``: N / (C n_c) for a
            class of n_c of the N training rows, C being the number of classes. Hand ``data.class_weights`` to
            :class:`lightning_distill.objectives.HardLabel`, as the recipes do.
        balanced: whether an epoch draws all classes equally often; rows of small classes are then repeated and some of
            large ones left out.
        seed: seed of the validation split, of ``max_train_rows`` and of the order of the batches.
        num_workers: worker processes of each dataloader.

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
        task: Literal["classification", "regression"] = "classification",
        seed: int = 0,
        num_workers: int = 0,
        class_weights: Literal["balanced"] | list[float] | None = None,
        balanced: bool = False,
    ) -> None:
        super().__init__(tokenizer, batch_size, seed, num_workers)
        check_sources(hub_dataset, train_file=train_file, val_file=val_file, test_file=test_file)
        self.text_columns = _text_columns(text_columns, label_column)
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("max_train_rows", max_train_rows)):
            if value is not None:
                integer(name, value, 1)
        if not 0 < val_split < 1:
            raise ValueError(f"Expected argument `val_split` to be between 0 and 1, but got {val_split}")
        one_of("task", task, ("classification", "regression"))
        check_class_weights(class_weights, balanced, task)
        self.files = {"train": train_file, "val": val_file, "test": test_file}
        self.label_column = label_column
        self.hub_dataset = hub_dataset
        self.max_length = max_length
        self.val_split = val_split
        self.max_train_rows = max_train_rows
        self.task = task
        self.balanced = balanced
        self._class_weights = class_weights
        self._given_label_names = _checked_names(label_names)
        self._found_label_names: list[str] = []
        self._rows: dict[str, Sequence[Row]] = {}

    @classmethod
    def from_rows(
        cls,
        train: Sequence[Row],
        val: Sequence[Row] | None = None,
        test: Sequence[Row] | None = None,
        **kwargs: Any,
    ) -> "TextClassificationData":
        """Make it of rows in memory instead of files.

        Args:
            train: rows (text, label) or (first text, second text, label).
            val: validation rows.
            test: test rows.
            **kwargs: as for the class.
        """
        data = cls(**kwargs)
        data._rows = {name: rows for name, rows in (("train", train), ("val", val), ("test", test)) if rows is not None}
        return data

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

    @cached_property
    def _tables(self) -> dict[str, Table]:
        wanted = [*self.text_columns, self.label_column]
        if self._rows:
            tables = {name: _table_of_rows(name, rows, wanted) for name, rows in self._rows.items()}
        elif self.hub_dataset is not None:
            tables, names = read_hub_dataset(self.hub_dataset, wanted, label_column=self.label_column)
            self._given_label_names = self._given_label_names or names
        elif self.files["train"] is not None:
            paths = {name: Path(path) for name, path in self.files.items() if path is not None}
            read = {path: read_table(path, wanted) for path in dict.fromkeys(paths.values())}
            tables = {name: read[path] for name, path in paths.items()}
        else:
            raise ValueError("There is no training data; set `train_file` or `hub_dataset`")
        if self.task == "classification":
            self._found_label_names = columns.label_names(tables["train"], self.label_column)
        if "val" not in tables:
            whole = tables["train"]
            if len(whole) < 2:
                raise ValueError(f"{whole.name}: one row cannot be split into training and validation rows")
            parts = hold_out(len(whole), self.val_split, random.Random(self.seed))
            tables["train"], tables["val"] = map(whole.take, parts)
        if self.max_train_rows is not None and self.max_train_rows < len(tables["train"]):
            kept = random.Random(self.seed).sample(range(len(tables["train"])), self.max_train_rows)
            tables["train"] = tables["train"].take(sorted(kept))
        return {"test": tables["val"]} | tables

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in the order of their ids; empty for regression. They may be set before ``setup``."""
        if self.task == "regression":
            return []
        _ = self._tables
        return self._given_label_names or self._found_label_names

    @label_names.setter
    def label_names(self, names: list[str] | None) -> None:
        _ = self._tables
        self._given_label_names = _checked_names(names)

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for regression."""
        return len(self.label_names) or 1

    @property
    def label2id(self) -> dict[str, int]:
        """The id of each class name, as a transformers config holds it."""
        return {name: index for index, name in enumerate(self.label_names)}

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each class id, as a transformers config holds it."""
        return dict(enumerate(self.label_names))

    def rows(self, split: Split) -> list[tuple[tuple[str, ...], float]]:
        """The texts of each row of a split, one or two, and its class id or number, in the order of its file."""
        table = self._tables[split]
        return list(zip(columns.texts(table, self.text_columns), self._labels(table), strict=True))

    def _labels(self, table: Table) -> Sequence[float]:
        if self.task == "regression":
            return columns.scores(table, self.label_column)
        names = self.label_names
        found = self._found_label_names
        if all(map(columns.is_whole, found)) and not set(found) <= set(map(columns.whole_number, names)):
            names = [str(index) for index in range(len(names))]  # the column holds ids, the names were given
        elif are_placeholders(found) and not set(found) <= set(names):
            names = found[: len(names)]  # they are ids too
        source = "`label_names`" if self._given_label_names else self._tables["train"].name
        return columns.label_ids(table, self.label_column, names, source)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise all splits; a second call does nothing."""
        if self._datasets:
            return
        tokenizer = self._load_tokenizer()
        dtype = torch.float32 if self.task == "regression" else torch.int64
        for split, table in self._tables.items():
            same = next((other for other in self._datasets if self._tables[other] is table), None)
            if same is not None:
                self._datasets[split] = self._datasets[same]
                continue
            texts, labels = columns.texts(table, self.text_columns), torch.tensor(self._labels(table), dtype=dtype)
            self._datasets[split] = rows = TokenizedText(texts, labels, tokenizer, self.max_length, table.name)
            cut = f"{rows.num_cut} of {len(rows)} texts are cut to {self.max_length} tokens"
            table.note(cut if rows.num_cut else "")

    @property
    def class_weights(self) -> list[float] | None:
        """The weight of each class, in the order of their ids; None where none were asked for."""
        if self._class_weights is None:
            return None
        return class_weights_of(self._class_weights, self._labels(self._tables["train"]), self.label_names)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = super()._load_tokenizer()
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token; set it, for example `tokenizer.pad_token = tokenizer.eos_token`, "
                "and `config.pad_token_id` of the models to the same id"
            )
        return tokenizer

    @property
    def collate(self) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:  # type: ignore[override]
        """The function that makes a batch of rows."""
        tokenizer = self._load_tokenizer()
        return partial(pad_rows, pad_token_id=tokenizer.pad_token_id, side=tokenizer.padding_side)


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


def _checked_names(names: list[str] | None) -> list[str] | None:
    if names is not None and (len(names) < 2 or len(set(names)) < len(names)):
        raise ValueError(f"Expected argument `label_names` to name two or more classes, but got {names}")
    return names


def _table_of_rows(name: str, rows: Sequence[Row], wanted: Sequence[str]) -> Table:
    name = f"{name} rows"
    if not len(rows):
        raise ValueError(f"{name}: there are none")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(wanted):
            raise ValueError(f"{name}:{number}: {len(row)} fields, expected {len(wanted)}: {', '.join(wanted)}")
    values = (list(column) for column in zip(*rows, strict=True))
    return Table(name, dict(zip(wanted, values, strict=True)), list(range(1, len(rows) + 1)))
