"""Documents of different lengths in rows of one length, without one attending to another.

transformers' ``DataCollatorWithFlattening`` joins what a batch happens to hold in one row, of another length each time.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_distill.models.batch import IGNORE_INDEX
from lightning_distill.models.calling import call_model, evaluating, logits_of


class Document(NamedTuple):
    """One text as token ids.

    Attributes:
        ids: its tokens.
        num_given: how many at its beginning are given and not learned; the first one always is.
    """

    ids: Sequence[int]
    num_given: int = 1


class Conversation(NamedTuple):
    """Questions and answers as token ids, of which the answers are learned.

    Attributes:
        ids: its tokens.
        learned: for each of them, whether it is learned; the first one never is.
    """

    ids: Sequence[int]
    learned: Sequence[bool]

    @property
    def num_given(self) -> int:
        """How many tokens stand before the first answer."""
        return max(list(self.learned).index(True), 1)


AnyDocument: TypeAlias = Document | Conversation | tuple[Sequence[int], int]


class PackedText(Dataset):
    """Documents packed into rows of one length, best fit first, so that few rows and little padding are needed.

    A document that is longer than a row is cut; its next piece repeats the last token of the one before, so every token
    but those that are given is a label exactly once. A document of a single token has nothing to predict and is left
    out, and so is a piece of a conversation without an answer. Where a row is not full it ends in padding whose labels
    are -100.

    No document attends to another: ``position_ids`` start at 0 with each one, which is what transformers reads their
    borders from as long as there is no ``attention_mask`` and no KV cache. :func:`check_packing` asks a model whether
    it does.

    Args:
        documents: the documents, tuples of :class:`Document`'s form or of :class:`Conversation`'s.
        max_length: tokens of a row, at least 2.
        pad_token_id: fills what is left of a row.

    Raises:
        ValueError: no document has two tokens, or ``max_length`` is below 2.

    Example:
        >>> data = PackedText([([1, 5, 6], 1), ([1, 7, 8, 9, 4], 2), ([1, 3], 1)], max_length=6, pad_token_id=0)
        >>> for row in data:
        ...     print(*(row[name].tolist() for name in ("input_ids", "position_ids", "labels")))
        [1, 7, 8, 9, 4, 0] [0, 1, 2, 3, 4, 0] [-100, -100, 8, 9, 4, -100]
        [1, 5, 6, 1, 3, 0] [0, 1, 2, 0, 1, 0] [-100, 5, 6, -100, 3, -100]

    Source: Ding et al., "Fewer Truncations Improve Language Modeling", 2024 (best-fit packing).
    """

    def __init__(self, documents: Iterable[AnyDocument], max_length: int, pad_token_id: int) -> None:
        if max_length < 2:
            raise ValueError(f"Expected argument `max_length` to be at least 2, but got {max_length}")
        pieces = list(_pieces(documents, max_length))
        if not pieces:
            raise ValueError("Expected argument `documents` to have one of at least two tokens, but got none")
        rows = _best_fit([len(ids) for ids, _ in pieces], max_length)
        empty = {"input_ids": pad_token_id, "position_ids": 0, "labels": IGNORE_INDEX}
        self._rows = {
            name: torch.full((len(rows), max_length), value, dtype=torch.int32) for name, value in empty.items()
        }
        for row, members in enumerate(rows):
            begin = 0
            for member in members:
                ids, learned = (torch.tensor(values) for values in pieces[member])
                end = begin + len(ids)
                self._rows["input_ids"][row, begin:end] = ids
                self._rows["position_ids"][row, begin:end] = torch.arange(len(ids))
                self._rows["labels"][row, begin:end] = torch.where(learned, ids, IGNORE_INDEX)
                begin = end
            self._rows["position_ids"][row, begin:] = torch.arange(max_length - begin)

    @property
    def num_labels(self) -> int:
        """How many tokens are predicted."""
        return int((self._rows["labels"] != IGNORE_INDEX).sum())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, all alike."""
        return [self._rows["labels"].shape[1]] * len(self)

    def __len__(self) -> int:
        return len(self._rows["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index].long() for name, values in self._rows.items()}


def _pieces(documents: Iterable[AnyDocument], max_length: int) -> Iterator[tuple[Sequence[int], list[bool]]]:
    """The tokens of each piece, and which of them are learned."""
    for ids, given in documents:
        learned = [place >= given for place in range(len(ids))] if isinstance(given, int) else list(given)
        for begin in range(0, len(ids) - 1, max_length - 1):
            end = begin + max_length
            marks = [False, *learned[begin + 1 : end]]  # nothing precedes the first token
            if isinstance(given, int) or any(marks):
                yield ids[begin:end], marks


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices, the longest first, each put where the least room is left that holds it."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where a row has r places left: the best fit is the lowest bit from the length on
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


@torch.no_grad()
def check_packing(model: nn.Module, name: str = "model") -> None:
    """Refuse a model whose documents would attend to each other when they are packed.

    Args:
        model: a causal language model of transformers; asked once, on six tokens.
        name: what the argument is called where the user gave it, for the error.

    Raises:
        ValueError: the second of two packed documents gets other logits than it gets alone.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> check_packing(LlamaForCausalLM(config))
    """
    device = next(model.parameters()).device
    rows: list[dict[str, Any]] = [
        {"input_ids": torch.tensor([ids], device=device), "position_ids": torch.tensor([positions], device=device)}
        for ids, positions in (([1, 2, 3, 2, 1, 3], [0, 1, 2, 0, 1, 2]), ([2, 1, 3], [0, 1, 2]))
    ]
    with evaluating(model):
        packed, alone = (logits_of(call_model(model, row)) for row in rows)
    if not torch.allclose(packed[:, 3:], alone, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"Expected argument `{name}` to keep packed documents apart by their `position_ids`, but a "
            f'`{type(model).__name__}` lets them attend to each other. Load it with `attn_implementation="sdpa"`, or '
            "give it one document a row."
        )
