"""Prompts out of a batch of training text."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_distill.models.batch import IGNORE_INDEX, token_mask


def prompts_of(batch: Any, max_length: int, generator: random.Random) -> list[Tensor]:
    """Take one prompt from each row of a batch: the beginning of one of its documents, drawn at random.

    Where a document begins with tokens that are no labels (an instruction), these are the prompt; plain text, of which
    only the first token is none, is cut after ``max_length`` tokens. A new document begins where ``position_ids`` do
    not go on by one; without them a row is one document.

    Args:
        batch: A mapping with ``input_ids`` and, where there are any, ``labels``, ``attention_mask`` and
            ``position_ids``, each ``[B, T]``.
        max_length: Tokens of a prompt of plain text, at least 1.
        generator: Draws the documents.

    Raises:
        ValueError: If a row has no document with a label, so that there is nothing to write on.

    Example:
        >>> batch = {"input_ids": torch.tensor([[1, 7, 8, 9]]), "labels": torch.tensor([[-100, 7, 8, 9]])}
        >>> prompts_of(batch, 2, random.Random(0))
        [tensor([1, 7])]
    """
    ids, mask = batch["input_ids"], token_mask(batch)
    labels = batch.get("labels", ids)
    prompts = []
    for row in range(len(ids)):
        positions = batch["position_ids"][row] if "position_ids" in batch else torch.arange(ids.shape[1])
        real = torch.ones_like(ids[row], dtype=torch.bool) if mask is None else mask[row]
        documents = [
            (tokens, given)
            for begin, end in _borders(positions)
            if (tokens := ids[row, begin:end][real[begin:end]]).numel() > 1
            and (given := _given(labels[row, begin:end][real[begin:end]])) < len(tokens)
        ]
        if not documents:
            raise ValueError(
                f"Expected every row of a batch to have a document with a label, to take a prompt from, but row {row} "
                "has none. Remove empty rows from the data."
            )
        tokens, given = generator.choice(documents)
        prompts.append(tokens[: given if given > 1 else min(max_length, len(tokens) - 1)])
    return prompts


def _borders(positions: Tensor) -> Iterator[tuple[int, int]]:
    starts = [0, *(((positions[1:] - positions[:-1]) != 1).nonzero().flatten() + 1).tolist(), len(positions)]
    return itertools.pairwise(starts)


def _given(labels: Tensor) -> int:
    """How many tokens stand before the first label."""
    found = (labels != IGNORE_INDEX).nonzero()
    return int(found[0]) if len(found) else len(labels)
