"""Texts that are written from other texts: translations, summaries, names."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_distill.arguments import integer, typed
from lightning_distill.data import columns
from lightning_distill.data.embedded import train_causal_tokenizer
from lightning_distill.data.function_names import function_names
from lightning_distill.data.progress import progress
from lightning_distill.data.rows import RowData
from lightning_distill.data.table import Table
from lightning_distill.data.tokenized import FlatRows, pad_rows
from lightning_distill.models.batch import IGNORE_INDEX


@typed
class SequenceToSequenceData(RowData):
    """Sources and the targets that are written from them, for a Trainer.

    A batch is a dict of ``input_ids`` and ``attention_mask`` ``[B, S]`` of the sources, with ``token_type_ids`` where
    the tokenizer makes them, and ``labels`` ``[B, T]`` of the targets, -100 at padding; all int64. What a decoder reads
    is made of the labels as each model does.

    Args:
        source_column: the column of the texts that are read.
        target_column: the column of the texts that are to be written.
        source_prefix: put before each source, as T5 is told what to do: ``"translate English to German: "``.
        max_length: longer sources are cut to this many tokens.
        max_target_length: longer targets are cut to this many tokens.
        **rows: see :class:`RowData`.

    Raises:
        ValueError: an argument is out of range, or a file is wrong: an empty source or target, by its file and line.

    Example:
        >>> tokenizer = train_causal_tokenizer(["ein Hund", "a dog"], vocab_size=270)
        >>> rows = [("ein Hund", "a dog"), ("Hund", "dog")]
        >>> data = SequenceToSequenceData.from_rows(rows * 2, rows, tokenizer=tokenizer)
        >>> data.setup()
        >>> batch = next(iter(data.val_dataloader()))
        >>> tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        ['ein Hund', 'Hund']
        >>> tokenizer.decode(batch["labels"][1])
        '<s>dog</s>'
    """

    task = "seq2seq_lm"

    def __init__(
        self,
        source_column: str = "source",
        target_column: str = "target",
        source_prefix: str = "",
        max_length: int = 128,
        max_target_length: int = 128,
        **rows: Any,
    ) -> None:
        super().__init__(**rows)
        integer("max_length", max_length, 1)
        integer("max_target_length", max_target_length, 1)
        if source_column == target_column:
            raise ValueError(
                f"Expected argument `target_column` to be another one than `source_column`, but got {target_column!r}"
            )
        self.columns, self.label_column = [source_column, target_column], target_column
        self.source_column, self.target_column, self.source_prefix = source_column, target_column, source_prefix
        self.max_length, self.max_target_length = max_length, max_target_length

    @classmethod
    def embedded(
        cls, *, max_rows: int = 6000, vocab_size: int = 2000, seed: int = 0, **kwargs: Any
    ) -> "SequenceToSequenceData":
        """Make it of the installed packages' functions: from what a docstring says, the words of the function's name.

        Args:
            max_rows: as for :func:`lightning_distill.data.function_names.function_names`; a tenth of the rows is for
                validation, a tenth for test.
            vocab_size: number of tokens of the tokenizer, which is trained on them on the spot.
            seed: seed of the rows and of the order of the batches.
            **kwargs: as for the class.
        """
        rows = function_names(max_rows, seed=seed)
        tenth = len(rows) // 10
        train, val, test = rows[2 * tenth :], rows[:tenth], rows[tenth : 2 * tenth]
        tokenizer = train_causal_tokenizer([text for row in train for text in row], vocab_size)
        return cls.from_rows(train, val, test, tokenizer=tokenizer, seed=seed, **kwargs)

    def dataset_of(self, table: Table) -> "TokenizedPairs":
        """The sources and targets of a table, tokenised."""
        sources, targets = (
            [text for (text,) in columns.texts(table, [column])] for column in (self.source_column, self.target_column)
        )
        sources = [f"{self.source_prefix}{source}" for source in sources]
        lengths = (self.max_length, self.max_target_length)
        return TokenizedPairs(sources, targets, self._load_tokenizer(), *lengths, table.name)

    @property
    def collate(self) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:  # type: ignore[override]
        """The function that makes a batch of samples."""
        tokenizer = self._load_tokenizer()
        return partial(_pad_pairs, pad_token_id=tokenizer.pad_token_id, side=tokenizer.padding_side)


class TokenizedPairs(Dataset):
    """Sources and targets as token ids.

    Args:
        sources: the texts that are read.
        targets: as many texts that are to be written.
        tokenizer: makes the tokens, those of the targets as its ``text_target``.
        max_length: longer sources are cut to this many tokens.
        max_target_length: longer targets are cut to this many.
        name: what the rows are called where progress is shown.

    Attributes:
        lengths: the tokens of each row, of source and target together.
        note: what is said of the texts that may have been cut.

    Raises:
        ValueError: the tokenizer has a token that ends a text, and ends no target with it.

    Example:
        >>> from lightning_distill.data import train_causal_tokenizer
        >>> tokenizer = train_causal_tokenizer(["ab"], vocab_size=260)
        >>> rows = TokenizedPairs(["a b"], ["b"], tokenizer, 16, 16)
        >>> rows.lengths, len(rows[0]["labels"])
        ([8], 3)
    """

    def __init__(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        max_target_length: int,
        name: str = "the texts",
    ) -> None:
        self._sources, cut_sources = _tokenized(tokenizer, sources, max_length, f"the sources of {name}")
        self._targets, cut_targets = _tokenized(
            tokenizer, targets, max_target_length, f"the targets of {name}", target=True
        )
        _check_end(tokenizer, self._targets)
        self.lengths = [sum(both) for both in zip(self._sources.lengths, self._targets.lengths, strict=True)]
        cut = {f"sources fill {max_length}": cut_sources, f"targets fill {max_target_length}": cut_targets}
        notes = [f"{count} of {len(self)} {what} tokens, and may be cut" for what, count in cut.items() if count]
        self.note = "; ".join(notes)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._sources[index] | {"labels": self._targets[index]["input_ids"]}


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, name: str, *, target: bool = False
) -> tuple[FlatRows, int]:
    """Texts as token ids, and how many fill the length they may have."""
    fields: dict[str, list[int]] = {}
    lengths: list[int] = []
    for begin in progress(range(0, len(texts), 1000), f"Tokenising {name}", unit="k texts"):
        part = list(texts[begin : begin + 1000])
        given: dict[str, Any] = {"text_target": part} if target else {"text": part}
        encoded = tokenizer(**given, truncation=True, max_length=max_length, return_attention_mask=False)
        for field, rows in encoded.items():
            fields.setdefault(field, []).extend(value for row in rows for value in row)
        lengths += map(len, encoded["input_ids"])
    rows = FlatRows({field: torch.tensor(values, dtype=torch.int32) for field, values in fields.items()}, lengths)
    return rows, sum(length >= max_length for length in lengths)


def _check_end(tokenizer: PreTrainedTokenizerBase, targets: FlatRows) -> None:
    """Refuse targets without an end, from which no model learns where to stop."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is not None and len(targets) and not bool((targets[0]["input_ids"] == end).any()):
        raise ValueError(
            f"Expected argument `tokenizer` to end a target with {tokenizer.convert_ids_to_tokens(end)!r}, which a "
            f"model learns to stop at, but a `{type(tokenizer).__name__}` gave "
            f"{tokenizer.convert_ids_to_tokens(targets[0]['input_ids'].tolist())[-4:]} at the end. Use the tokenizer "
            "of an encoder-decoder, or add a post-processor that ends texts."
        )


def _pad_pairs(rows: list[dict[str, Tensor]], pad_token_id: int, side: str) -> dict[str, Tensor]:
    """A batch of rows; labels are padded on the right wherever sources are: a decoder reads them from their start."""
    labels = pad_sequence([row["labels"] for row in rows], True, IGNORE_INDEX).long()
    sources = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    return {**pad_rows(sources, pad_token_id, side), "labels": labels}
