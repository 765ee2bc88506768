"""Rows with named columns, from files, from the hub or from memory: what data modules of rows have in common."""

import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_distill.arguments import integer, typed
from lightning_distill.data import columns
from lightning_distill.data.classes import class_weights_of, label_weights_of
from lightning_distill.data.hub import read_hub_dataset
from lightning_distill.data.module import ResumableData, Split, check_sources, hold_out
from lightning_distill.data.readers import read_table
from lightning_distill.data.table import Table
from lightning_distill.data.tokenized import pad_rows
from lightning_distill.models.class_names import are_placeholders
from lightning_distill.models.pretrained import load_tokenizer
from lightning_distill.tasks import TASKS, TaskName

Row = tuple[Any, ...]
Data = TypeVar("Data", bound="RowData")


@typed
class RowData(ResumableData):
    """Rows with named columns for a Trainer. A subclass says which columns it reads, and makes a dataset of a table.

    It gives :attr:`task`, :attr:`columns` and :meth:`dataset_of`; where its labels are not one class a row,
    :attr:`label_column` and :meth:`label_table` too; where its files are of a kind of their own, :meth:`read`; where
    its samples are not tokens, :attr:`collate` and :meth:`read_as`. Its own arguments go before those here, which it
    takes as ``**rows``: the flags of a recipe are read off both.

    Args:
        train_file: a tsv, csv, json, jsonl (ndjson) or parquet file; tsv and csv with a header. All but parquet may be
            packed, as ``train.tsv.gz``.
        val_file: the validation file; default: a part of the training file, see ``val_split``.
        test_file: the test file; default: the validation rows are the test rows too.
        hub_dataset: instead of files: ``"name"``, ``"name/configuration"`` such as ``"glue/sst2"``, or a local folder
            that ``datasets.load_dataset`` understands. Needs ``pip install "lightning-distill[hub]"``.
        label_names: names of the classes in the order of their ids, to follow a teacher's order, or to name the
            numbers 0, 1, ... of the label column.
        tokenizer: a tokenizer, or the name or folder of one; it may be set later, before ``setup``.
        batch_size: rows in a batch of one process.
        val_split: the share of the training rows held out when there is no validation file.
        max_train_rows: train on at most this many rows, drawn at random.
        seed: seed of the validation split, of ``max_train_rows`` and of the order of the batches.
        num_workers: worker processes of each dataloader.

    Raises:
        ValueError: an argument is out of range, or a file is wrong; errors about files name file and line.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> class Points(RowData):
        ...     task, columns, collate = "regression", ("x", "y"), None
        ...     def dataset_of(self, table):
        ...         points = TensorDataset(*(torch.tensor(table.columns[name]) for name in self.columns))
        ...         points.lengths = [1] * len(points)
        ...         return points
        >>> data = Points.from_rows([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)], batch_size=2)
        >>> data.setup()
        >>> [len(x) for x, y in data.train_dataloader()], data.num_rows("val")
        ([2], 1)
    """

    #: What a batch asks for, by its name in :data:`lightning_distill.tasks.TASKS`.
    task: TaskName
    #: The columns that are read, in the order in which :meth:`from_rows` takes their values.
    columns: Sequence[str]
    #: The column of labels, if one has them: splits of a hub data set without any are passed over.
    label_column: str | None = None
    #: The columns that may hold bytes, as encoded pictures do.
    binary_columns: Collection[str] = ()
    _class_weights: Any = None

    def __init__(
        self,
        train_file: str | Path | None = None,
        val_file: str | Path | None = None,
        test_file: str | Path | None = None,
        hub_dataset: str | None = None,
        label_names: list[str] | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        batch_size: int = 32,
        val_split: float = 0.1,
        max_train_rows: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, seed, num_workers)
        check_sources(hub_dataset, train_file=train_file, val_file=val_file, test_file=test_file)
        integer("batch_size", batch_size, 1)
        if max_train_rows is not None:
            integer("max_train_rows", max_train_rows, 1)
        if not 0 < val_split < 1:
            raise ValueError(f"Expected argument `val_split` to be between 0 and 1, but got {val_split}")
        self.files = {"train": train_file, "val": val_file, "test": test_file}
        self.hub_dataset = hub_dataset
        self.val_split = val_split
        self.max_train_rows = max_train_rows
        self._given_label_names = _checked_names(label_names)
        self._found_label_names: list[str] = []
        self._said_label_names: list[str] | None = None
        self._rows: dict[str, Sequence[Row]] = {}

    @classmethod
    def from_rows(
        cls: type[Data],
        train: Sequence[Row],
        val: Sequence[Row] | None = None,
        test: Sequence[Row] | None = None,
        **kwargs: Any,
    ) -> Data:
        """Make it of rows in memory instead of files.

        Args:
            train: rows, each with a value for each of :attr:`columns`.
            val: validation rows.
            test: test rows.
            **kwargs: as for the class.
        """
        data = cls(**kwargs)
        data._rows = {name: rows for name, rows in (("train", train), ("val", val), ("test", test)) if rows is not None}
        return data

    # -- what a subclass gives ---------------------------------------------------------------------------------------

    def dataset_of(self, table: Table) -> Dataset:
        """Make the dataset of a split: map-style, with ``lengths``, and with a ``note`` on what became of its rows."""
        raise NotImplementedError

    def read(self, path: Path) -> Table:
        """Read a file, of which there are :attr:`columns`."""
        return read_table(path, self.columns, binary=self.binary_columns)

    def label_table(self, table: Table) -> Table:
        """The table whose label column holds one label a row; of lists of labels that is ``table.explode(...)``."""
        return table

    @property
    def collate(self) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:  # type: ignore[override]
        """The function that makes a batch of samples."""
        tokenizer = self._load_tokenizer()
        return partial(pad_rows, pad_token_id=tokenizer.pad_token_id, side=tokenizer.padding_side)

    def read_as(self, path: str, name: str, model: Any) -> None:
        """Read rows as a model does: take the tokenizer of its folder, unless it is another's.

        Args:
            path: the folder, or hub id.
            name: what the argument is called where the user gave it, for the error.
            model: the model.
        """
        self.tokenizer = load_tokenizer(path, name, model)

    # -- tables ------------------------------------------------------------------------------------------------------

    @cached_property
    def _tables(self) -> dict[str, Table]:
        tables = self._read_tables()
        if self.names_classes:
            assert self.label_column is not None
            said = tables["train"].class_names.get(self.label_column)
            self._said_label_names = said
            self._given_label_names = self._given_label_names or said
            self._found_label_names = columns.label_names(self.label_table(tables["train"]), self.label_column)
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

    def _read_tables(self) -> dict[str, Table]:
        if self._rows:
            return {name: _table_of_rows(name, rows, self.columns) for name, rows in self._rows.items()}
        if self.hub_dataset is not None:
            options: dict[str, Any] = {"label_column": self.label_column, "binary": self.binary_columns}
            return read_hub_dataset(self.hub_dataset, self.columns, **options)
        if self.files["train"] is None:
            raise ValueError("There is no training data; set `train_file` or `hub_dataset`")
        paths = {name: Path(path) for name, path in self.files.items() if path is not None}
        read = {path: self.read(path) for path in dict.fromkeys(paths.values())}
        return {name: read[path] for name, path in paths.items()}

    def num_rows(self, split: Split) -> int:
        """Number of rows of a split."""
        return len(self._tables[split])

    def setup(self, stage: str | None = None) -> None:
        """Read all splits and make their datasets; a second call does nothing."""
        if self._datasets:
            return
        for split, table in self._tables.items():
            same = next((other for other in self._datasets if self._tables[other] is table), None)
            if same is not None:
                self._datasets[split] = self._datasets[same]
                continue
            self._datasets[split] = dataset = self.dataset_of(table)
            table.note(getattr(dataset, "note", ""))

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = super()._load_tokenizer()
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token; set it, for example `tokenizer.pad_token = tokenizer.eos_token`, "
                "and `config.pad_token_id` of the models to the same id"
            )
        return tokenizer

    # -- classes -----------------------------------------------------------------------------------------------------

    @property
    def names_classes(self) -> bool:
        """Whether labels are classes with names, which a model's config has too."""
        return TASKS[self.task].names_classes

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in the order of their ids, empty where there are none. May be set before ``setup``."""
        if not self.names_classes:
            return []
        _ = self._tables
        return self._given_label_names or self._found_label_names

    @label_names.setter
    def label_names(self, names: list[str] | None) -> None:
        _ = self._tables
        self._given_label_names = _checked_names(names)

    @property
    def labels_are_ids(self) -> bool:
        """Whether the label column holds numbers, which are ids of classes whatever these are called."""
        _ = self._tables
        return bool(self._found_label_names) and all(map(columns.is_whole, self._found_label_names))

    @property
    def num_labels(self) -> int | None:
        """Number of outputs of a model's head; None where that does not depend on the data."""
        return len(self.label_names) or None

    @property
    def label2id(self) -> dict[str, int]:
        """The id of each class name, as a transformers config holds it."""
        return {name: index for index, name in enumerate(self.label_names)}

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each class id, as a transformers config holds it."""
        return dict(enumerate(self.label_names))

    def label_ids(self, table: Table) -> list[int]:
        """The class of each row of :meth:`label_table`."""
        assert self.label_column is not None
        names, found = self.label_names, self._found_label_names
        if all(map(columns.is_whole, found)) and not set(found) <= set(map(columns.whole_number, names)):
            said = self._said_label_names or names
            order = said if set(said) == set(names) else names
            names = [str(order.index(name)) for name in names]  # the column holds ids, the names were given
        elif are_placeholders(found) and not set(found) <= set(names):
            names = found[: len(names)]  # they are ids too
        source = "`label_names`" if self._given_label_names else self._tables["train"].name
        return columns.label_ids(self.label_table(table), self.label_column, names, source)

    @property
    def class_weights(self) -> list[float] | None:
        """The weight of each class, or label, in the order of their ids; None where none were asked for."""
        if self._class_weights is None:
            return None
        table, names = self._tables["train"], self.label_names
        ids = self.label_ids(table)
        if TASKS[self.task].exclusive:
            return class_weights_of(self._class_weights, ids, names)
        counts = Counter(ids)
        return label_weights_of(self._class_weights, [counts[i] for i in range(len(names))], len(table), names)

    @property
    def label_weights(self) -> dict[str, list[float]]:
        """What :class:`lightning_distill.objectives.HardLabel` takes of them, by the name of its argument."""
        weights = self.class_weights
        return {} if weights is None else {"class_weights" if TASKS[self.task].exclusive else "pos_weight": weights}


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
