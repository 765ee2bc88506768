"""Tokenised texts in memory, and batches of them as long as their longest row."""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_distill.data.progress import progress
from lightning_distill.models.batch import IGNORE_INDEX


class FlatRows(Dataset):
    """Rows of tokens in flat arrays: four bytes a token, and nothing for workers to copy.

    Args:
        fields: by name, the values of all rows one after the other, ``[tokens]``.
        lengths: the length of each row.

    Example:
        >>> rows = FlatRows({"input_ids": torch.tensor([5, 6, 7])}, [1, 2])
        >>> len(rows), rows[1]
        (2, {'input_ids': tensor([6, 7])})
    """

    def __init__(self, fields: Mapping[str, Tensor], lengths: list[int]) -> None:
        self.lengths = lengths
        self._fields = dict(fields)
        self._ends = torch.tensor(lengths).cumsum(0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        end = int(self._ends[index])
        return {name: values[end - self.lengths[index] : end] for name, values in self._fields.items()}


class TokenizedText(FlatRows):
    """Texts as token ids.

    Args:
        texts: one tuple per row, of one text or of two.
        labels: one label per row, ``[N]``.
        tokenizer: makes the tokens.
        max_length: longer texts are cut to this many tokens.
        name: what the rows are called where progress is shown.

    Attributes:
        num_cut: how many texts were longer.
        note: what is said of it.

    Example:
        >>> from lightning_distill.data import train_tokenizer
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
        lengths: list[int] = []
        self.num_cut = 0
        for begin in progress(range(0, len(texts), 1000), f"Tokenising {name}", unit="k texts"):
            columns = [list(column) for column in zip(*texts[begin : begin + 1000], strict=True)]
            encoded = tokenizer(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
            for name, rows in encoded.items():
                chunks.setdefault(name, []).append(torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int32))
            lengths += map(len, encoded["input_ids"])
            # Only fast tokenizers say what they cut; a row that is not full is not asked.
            self.num_cut += sum(
                bool(encoding.overflowing)
                for encoding, ids in zip(encoded.encodings or (), encoded["input_ids"], strict=False)
                if len(ids) >= max_length
            )
        super().__init__({name: torch.cat(parts) for name, parts in chunks.items()}, lengths)
        self.labels = labels
        cut = f"{self.num_cut} of {len(self)} texts are cut to {max_length} tokens"
        self.note = cut if self.num_cut else ""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return super().__getitem__(index) | {"labels": self.labels[index]}


def pad_rows(rows: list[dict[str, Tensor]], pad_token_id: int, side: str = "right") -> dict[str, Tensor]:
    """Put rows ``[length]`` into one batch ``[B, T]`` of int64, with its ``attention_mask``.

    Labels of tokens are padded with -100; what is one number a row, or a row of fractions, is stacked.

    transformers' ``DataCollatorWithPadding`` gives the same batches by way of lists, in 2 to 14 times the time.

    Example:
        >>> rows = [{"input_ids": torch.tensor([5, 6, 7])}, {"input_ids": torch.tensor([8])}]
        >>> batch = pad_rows(rows, pad_token_id=1)
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[5, 6, 7], [8, 1, 1]], [[1, 1, 1], [1, 0, 0]])
    """
    rows = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    fields = {name: [row[name] for row in rows] for name in rows[0]}
    fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    return {
        name: torch.stack(values)
        if values[0].ndim == 0 or values[0].is_floating_point()
        else pad_sequence(values, True, fill.get(name, 0), side).long()
        for name, values in fields.items()
    }
