"""Plain text for language models, from files, from the hub or from memory, packed into rows of one length."""

import random
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_distill.arguments import between, integer, typed
from lightning_distill.data.chat import CHAT_COLUMNS, Chat, Completion, Text, encode, texts_of
from lightning_distill.data.embedded import embedded_corpus, train_causal_tokenizer
from lightning_distill.data.hub import read_hub_dataset
from lightning_distill.data.module import ResumableData, Split, check_sources, hold_out
from lightning_distill.data.packing import Conversation, Document, PackedText
from lightning_distill.data.progress import progress
from lightning_distill.data.readers import kind_of, read_table, read_text
from lightning_distill.data.table import Table, listed


@typed
class LanguageModelData(ResumableData):
    """Documents for a causal language model, packed into rows of ``max_length`` tokens.

    Documents are framed as their tokenizer frames them (many put a first token, few a last one), and none attends to
    another; see :class:`lightning_distill.data.packing.PackedText`. Training rows come in an order that is a function
    of the seed and the epoch and resumes in the middle of one; see :class:`BucketBatchSampler`.

    A document may be a conversation: a column ``messages``, a list of ``{"role": ..., "content": ...}`` in each row, or
    columns ``prompt`` and ``completion``. It goes through the tokenizer's chat template, and only the assistant's
    answers are learned, each with the token that ends it; see :func:`lightning_distill.data.chat.encode`.

    A batch is a dict of ``input_ids``, ``position_ids`` and ``labels``, each ``[B, max_length]`` int64; labels are -100
    at the first token of each document, which nothing precedes, at what is given of a conversation, and at padding.

    Args:
        text_files: files to train on. A ``.txt`` file holds documents between separators; a tsv, csv, json, jsonl
            (ndjson) or parquet file one a row. All but parquet may be packed, as ``text.jsonl.gz``.
        val_files: likewise, for validation; default: a part of the training documents, see ``val_split``.
        test_files: likewise, for test; default: another part of them of that size.
        separator: the line between two documents of a ``.txt`` file; a file without it is one document.
        text_column: the column of the text, or of the messages, in the other kinds of file and on the hub. Where there
            is no column ``text``, which is the default, those of conversations are taken.
        hub_dataset: instead of files: ``"name"``, ``"name/configuration"``, or a local folder that
            ``datasets.load_dataset`` understands. Needs ``pip install "lightning-distill[hub]"``.
        tokenizer: a tokenizer, or the name or folder of one; it may be set later, before ``setup``.
        add_eos: whether to put the tokenizer's last token behind each document where it does not itself.
        batch_size: rows in a batch of one process.
        max_length: tokens of a row; longer documents are cut, not shortened.
        val_split: share of the training documents held out for each of validation and test, where there are no files.
        max_train_documents: train on at most this many documents, drawn at random.
        seed: seed of the splits and of the order of the batches.
        num_workers: worker processes of each dataloader.

    Raises:
        ValueError: an argument is out of range, or a file is wrong; errors about files name the file.

    Example:
        >>> texts = [f"the {word} sat" for word in ("cat", "dog", "hen", "cow")] * 5
        >>> tokenizer = train_causal_tokenizer(texts, vocab_size=280)
        >>> data = LanguageModelData.from_texts(texts, tokenizer=tokenizer, batch_size=2, max_length=32)
        >>> data.setup()
        >>> next(iter(data.train_dataloader()))["labels"].shape
        torch.Size([2, 32])
    """

    task = "causal_lm"

    def __init__(
        self,
        text_files: list[str] | str | None = None,
        val_files: list[str] | str | None = None,
        test_files: list[str] | str | None = None,
        separator: str = "<|endoftext|>",
        text_column: str = "text",
        hub_dataset: str | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        add_eos: bool = False,
        batch_size: int = 8,
        max_length: int = 512,
        val_split: float = 0.05,
        max_train_documents: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(tokenizer, batch_size, seed, num_workers)
        check_sources(hub_dataset, text_files=text_files, val_files=val_files, test_files=test_files)
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
            integer(name, value, least)
        if max_train_documents is not None:
            integer("max_train_documents", max_train_documents, 1)
        between("val_split", val_split, 0, 0.5)
        if not separator:
            raise ValueError("Expected argument `separator` to be some text, but got none")
        self.files = {"train": _listed(text_files), "val": _listed(val_files), "test": _listed(test_files)}
        self.separator = separator
        self.text_column = text_column
        self.hub_dataset = hub_dataset
        self.add_eos = add_eos
        self.max_length = max_length
        self.val_split = val_split
        self.max_train_documents = max_train_documents
        self._given: dict[str, Sequence[Any]] = {}
        self._documents: dict[str, list[Document | Conversation]] = {}

    @classmethod
    def from_texts(
        cls, train: Sequence[Any], val: Sequence[Any] = (), test: Sequence[Any] = (), **kwargs: Any
    ) -> "LanguageModelData":
        """Make it of documents in memory instead of files.

        Args:
            train: documents: texts, or conversations as lists of messages.
            val: documents for validation.
            test: documents for test.
            **kwargs: as for the class.
        """
        data = cls(**kwargs)
        data._given = {name: texts for name, texts in (("train", train), ("val", val), ("test", test)) if texts}
        return data

    @classmethod
    def embedded(
        cls, *, max_rows_per_class: int = 1300, vocab_size: int = 2000, seed: int = 0, **kwargs: Any
    ) -> "LanguageModelData":
        """Make it of docstrings of the installed packages, with a tokenizer trained on them on the spot.

        Args:
            max_rows_per_class: as for :func:`embedded_corpus`.
            vocab_size: number of tokens of the tokenizer.
            seed: seed of the documents, the splits and the order of the batches.
            **kwargs: as for the class.
        """
        texts = [text for text, _ in embedded_corpus(max_rows_per_class, seed=seed)]
        data = cls.from_texts(texts, seed=seed, **kwargs)
        data.tokenizer = train_causal_tokenizer([str(text) for text in data._texts["train"]], vocab_size)
        return data

    @cached_property
    def _texts(self) -> dict[str, list[Text]]:
        if self._given:
            tables = {name: Table(f"{name} texts", {self.text_column: list(texts)}, list(range(1, len(texts) + 1)))
                      for name, texts in self._given.items()}  # fmt: skip
            found = {split: _texts_of_table(table) for split, table in tables.items()}
        elif self.hub_dataset is not None:
            tables = read_hub_dataset(self.hub_dataset, *self._columns)
            found = {split: _texts_of_table(table) for split, table in tables.items()}
        elif self.files["train"]:
            paths = dict.fromkeys(path for paths in self.files.values() for path in paths)
            read = {path: self._read(path) for path in paths}
            found = {split: [text for path in paths for text in read[path]]
                     for split, paths in self.files.items() if paths}  # fmt: skip
        else:
            raise ValueError("There is no training text; set `text_files` or `hub_dataset`")
        generator = random.Random(self.seed)
        for split in ("val", "test"):
            if split not in found:
                found["train"], found[split] = self._hold_out(found["train"], generator)
        if self.max_train_documents is not None and self.max_train_documents < len(found["train"]):
            found["train"] = generator.sample(found["train"], self.max_train_documents)
        return found

    def _hold_out(self, texts: list[Text], generator: random.Random) -> list[list[Text]]:
        if len(texts) < 2:
            raise ValueError(
                "Expected the training text to have a document for each of training, validation and test, but got "
                f"{len(texts)} left. Set `separator` to what stands between two documents, or give `val_files` and "
                "`test_files`."
            )
        return [[texts[place] for place in part] for part in hold_out(len(texts), self.val_split, generator)]

    @property
    def _columns(self) -> list[list[str]]:
        """The columns to read: those named, or, where there is no column of the default's name, a conversation's."""
        return [[self.text_column], *(CHAT_COLUMNS if self.text_column == "text" else ())]

    def _read(self, path: str) -> list[Text]:
        if kind_of(Path(path)) != ".txt":
            return _texts_of_table(read_table(path, *self._columns))
        documents: list[Text] = [text for text in map(str.strip, read_text(path).split(self.separator)) if text]
        if not documents:
            raise ValueError(f"{path}: the file has no text")
        return documents

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenise and pack all splits; a second call does nothing."""
        for split in ("train", "val", "test"):
            if split not in self._datasets:
                self._pack(split, self.documents(split))

    def documents(self, split: Split) -> list[Document | Conversation]:
        """The documents of a split as token ids, whole, in the order of their file."""
        if split not in self._documents:
            tokenizer, texts = self._load_tokenizer(), self._texts[split]
            eos = tokenizer.eos_token_id
            if self.add_eos and eos is None:
                raise ValueError("Expected argument `tokenizer` to have an `eos_token` beside `add_eos`, but got none")
            documents: list[Document | Conversation] = []
            for begin in progress(range(0, len(texts), 1000), f"Tokenising {split}", unit="k documents"):
                documents += _encode(tokenizer, texts[begin : begin + 1000], eos if self.add_eos else None)
            self._documents[split] = documents
        return self._documents[split]

    def replace_training_documents(self, documents: Sequence[Document | Conversation]) -> None:
        """Train on other documents, such as a teacher's generations, from the next dataloader on."""
        self._pack("train", documents)

    def _pack(self, split: str, documents: Sequence[Document | Conversation]) -> None:
        tokenizer = self._load_tokenizer()
        # Padding is told by its labels and its positions, so any token will do where the tokenizer has none for it.
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        self._datasets[split] = PackedText(documents, self.max_length, pad)

    def dataset(self, split: Split) -> PackedText:
        """The packed rows of a split, after ``setup``."""
        dataset: PackedText = self._datasets[split]
        return dataset


def _listed(paths: list[str] | str | None) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths or [])


def _texts_of_table(table: Table) -> list[Text]:
    texts = texts_of(table)
    if not texts:
        raise ValueError(f"{table.name}: no row has text in {listed(list(table.columns))}")
    blank = len(table) - len(texts)
    table.note(f"{blank} rows without text are left out" if blank else "")
    return texts


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], eos: int | None
) -> Iterable[Document | Conversation]:
    plain = [text for text in texts if isinstance(text, str)]
    ids = iter(tokenizer(plain, return_attention_mask=False, verbose=False)["input_ids"] if plain else ())
    for text in texts:
        document = encode(tokenizer, text) if isinstance(text, Chat | Completion) else Document(next(ids))
        # A chat template ends an answer itself.
        if eos is not None and isinstance(document, Document) and list(document.ids[-1:]) != [eos]:
            document = Document([*document.ids, eos], document.num_given)
        yield document
