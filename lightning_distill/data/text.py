"""Labelled text for training and evaluation, from files, from the hub or from rows in memory."""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_distill.arguments import integer, one_of, typed
from lightning_distill.data import files, hub
from lightning_distill.data.classes import check_class_weights, class_weights_of
from lightning_distill.data.embedded import embedded_corpus, train_tokenizer
from lightning_distill.data.module import TextData
from lightning_distill.data.progress import progress
from lightning_distill.data.table import Table, listed
from lightning_distill.models.class_names import are_placeholders

Row = tuple[Any, ...]


class TokenizedText(Dataset):
    """Texts as token ids, in flat arrays: four bytes a token, and nothing for workers to copy.

    Args:
        texts: one tuple per row, of one text or of two.
        labels: one label per row, ``[N]``.
        tokenizer: makes the tokens.
        max_length: longer texts are cut to this many tokens.
        name: what the rows are called where progress is shown.

    Attributes:
        num_cut: how many texts were longer.

    Example:
        >>> tokenizer = train_tokenizer(["good", "bad"], vocab_size=20)
        >>> data = TokenizedText([("good",), ("bad bad",)], torch.tensor([1, 0]), tokenizer, max_length=8)
        >>> data.lengths, data[1]["labels"]
        ([3, 4], tensor(0))
    """

    def __init__(
        self,
        texts: Sequence[tuple[str, ...]],
        labels: Tensor,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        name: str = "the texts",
    ) -> None:
        chunks: dict[str, list[Tensor]] = {}
        self.lengths: list[int] = []
        self.num_cut = 0
        for begin in progress(range(0, len(texts), 1000), f"Tokenising {name}", unit="k texts"):
            columns = [list(column) for column in zip(*texts[begin : begin + 1000], strict=True)]
            encoded = tokenizer(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
            for name, rows in encoded.items():
                chunks.setdefault(name, []).append(torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int32))
            self.lengths += map(len, encoded["input_ids"])
            # Only fast tokenizers say what they cut; a row that is not full is not asked.
            self.num_cut += sum(
                bool(encoding.overflowing)
                for encoding, ids in zip(encoded.encodings or (), encoded["input_ids"], strict=False)
                if len(ids) >= max_length
            )
        self._tokens = {name: torch.cat(parts) for name, parts in chunks.items()}
        self._ends = torch.tensor(self.lengths).cumsum(0)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        end = int(self._ends[index])
        row = {name: tokens[end - self.lengths[index] : end] for name, tokens in self._tokens.items()}
        return row | {"labels": self.labels[index]}


class PadBatch:
    """Put rows of different lengths into one batch, as long as its longest row.

    Args:
        pad_token_id: fills ``input_ids``; the other fields are filled with 0.
        side: ``"right"`` or ``"left"``, where the padding goes.

    Example:
        >>> rows = [{"input_ids": torch.tensor([5, 6, 7])}, {"input_ids": torch.tensor([8])}]
        >>> batch = PadBatch(pad_token_id=1)(rows)
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[5, 6, 7], [8, 1, 1]], [[1, 1, 1], [1, 0, 0]])
    """

    def __init__(self, pad_token_id: int, side: str = "right") -> None:
        self.pad_token_id = pad_token_id
        self.side = side

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad the rows, ``[length]`` each, to a batch ``[B, T]`` of int64 with its ``attention_mask``."""
        rows = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
        batch = {}
        for name in rows[0]:
            fields = [row[name] for row in rows]
            if name == "labels":
                batch[name] = torch.stack(fields)
            else:
                fill = self.pad_token_id if name == "input_ids" else 0
                batch[name] = torch.nn.utils.rnn.pad_sequence(fields, True, fill, self.side).long()
        return batch


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
        if train_file is not None and hub_dataset is not None:
            raise ValueError("Expected one of the arguments `train_file` and `hub_dataset`, but got both")
        for name, file in (("val_file", val_file), ("test_file", test_file)):
            if file is not None and train_file is None:
                beside = "none" if hub_dataset is None else "a `hub_dataset`, which has its own splits"
                raise ValueError(f"Expected argument `train_file` beside `{name}`, to train on, but got {beside}")
        # "a,b" is what one types; a column whose name has a comma is given as a list.
        columns = text_columns.split(",") if isinstance(text_columns, str) else text_columns
        self.text_columns = [column.strip() for column in columns]
        if len(self.text_columns) not in (1, 2) or not all(self.text_columns):
            raise ValueError(f"Expected argument `text_columns` to name one or two columns, but got {text_columns!r}")
        if len({*self.text_columns, label_column}) <= len(self.text_columns):
            raise ValueError(
                f"Expected argument `text_columns` to name other columns than each other and `label_column`, but got "
                f"{text_columns!r} beside {label_column!r}"
            )
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("max_train_rows", max_train_rows)):
            if value is not None:
                integer(name, value, 1)
        if not 0 < val_split < 1:
            raise ValueError(f"Expected argument `val_split` to be between 0 and 1, but got {val_split}")
        one_of("task", task, ("classification", "regression"))
        if label_names is not None and (len(label_names) < 2 or len(set(label_names)) < len(label_names)):
            raise ValueError(f"Expected argument `label_names` to name two or more classes, but got {label_names}")
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
        self._given_label_names = label_names
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

        Returns:
            The data.
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

        Returns:
            The data.
        """
        rows = embedded_corpus(max_rows_per_class, seed=seed)
        tenth = len(rows) // 10
        train, val, test = rows[2 * tenth :], rows[:tenth], rows[tenth : 2 * tenth]
        tokenizer = train_tokenizer([text for text, _ in train], vocab_size)
        return cls.from_rows(train, val, test, tokenizer=tokenizer, seed=seed, **kwargs)

    @cached_property
    def _tables(self) -> dict[str, Table]:
        columns = [*self.text_columns, self.label_column]
        if self._rows:
            tables = {name: _table_of_rows(name, rows, columns) for name, rows in self._rows.items()}
        elif self.hub_dataset is not None:
            tables, names = hub.read_hub_dataset(self.hub_dataset, columns, label_column=self.label_column)
            self._given_label_names = self._given_label_names or names
        elif self.files["train"] is not None:
            paths = {name: Path(path) for name, path in self.files.items() if path is not None}
            read = {path: files.read_table(path, columns) for path in dict.fromkeys(paths.values())}
            tables = {name: read[path] for name, path in paths.items()}
        else:
            raise ValueError("There is no training data; set `train_file` or `hub_dataset`")
        if self.task == "classification":
            self._found_label_names = files.label_names(tables["train"], self.label_column)
        if "val" not in tables:
            tables["train"], tables["val"] = _split(tables["train"], self.val_split, self.seed)
        if self.max_train_rows is not None and self.max_train_rows < len(tables["train"]):
            kept = random.Random(self.seed).sample(range(len(tables["train"])), self.max_train_rows)
            tables["train"] = tables["train"].take(sorted(kept))
        return {"test": tables["val"]} | tables

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the classes in the order of their ids; empty for regression."""
        if self.task == "regression":
            return []
        _ = self._tables
        return self._given_label_names or self._found_label_names

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

    def rows(self, split: Literal["train", "val", "test"]) -> list[tuple[tuple[str, ...], float]]:
        """List texts and labels of a split in the order of its file.

        Args:
            split: which rows.

        Returns:
            For each row its texts, one or two, and its class id or number.
        """
        table = self._tables[split]
        return list(zip(files.texts(table, self.text_columns), self._labels(table), strict=True))

    def _labels(self, table: Table) -> Sequence[float]:
        if self.task == "regression":
            return files.scores(table, self.label_column)
        names = self.label_names
        found = self._found_label_names
        if all(re.fullmatch(r"-?\d+", label) for label in found) and not set(found) <= set(
            map(files.whole_number, names)
        ):
            names = [str(index) for index in range(len(names))]  # the column holds ids, the names were given
        elif are_placeholders(found) and not set(found) <= set(names):
            names = found[: len(names)]  # they are ids too
        source = "`label_names`" if self._given_label_names else self._tables["train"].name
        return files.label_ids(table, self.label_column, names, source)

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
            texts, labels = files.texts(table, self.text_columns), torch.tensor(self._labels(table), dtype=dtype)
            self._datasets[split] = rows = TokenizedText(texts, labels, tokenizer, self.max_length, table.name)
            said = [f"{rows.num_cut} of {len(rows)} texts are cut to {self.max_length} tokens"] if rows.num_cut else []
            if table.unused:
                said.append(f"columns that are not used: {listed(table.unused)}")
            if said:
                rank_zero_info(f"{table.name}: {'; '.join(said)}")

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
        return PadBatch(tokenizer.pad_token_id, tokenizer.padding_side)


def _table_of_rows(name: str, rows: Iterable[Row], columns: Sequence[str]) -> Table:
    table = Table(f"{name} rows", {column: [] for column in columns}, [])
    for number, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise ValueError(f"{table.name}:{number}: {len(row)} fields, expected {len(columns)}: {', '.join(columns)}")
        for column, value in zip(columns, row, strict=True):
            table.columns[column].append(value)
        table.lines.append(number)
    if not len(table):
        raise ValueError(f"{table.name}: there are none")
    return table


def _split(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    """Hold out a share of the rows, at least one, at random."""
    if len(table) < 2:
        raise ValueError(f"{table.name}: one row cannot be split into training and validation rows")
    size = min(max(round(share * len(table)), 1), len(table) - 1)
    held_out = set(random.Random(seed).sample(range(len(table)), size))
    return table.take([i for i in range(len(table)) if i not in held_out]), table.take(sorted(held_out))
