"""What a batch is: where its labels are, which of its tokens are real, what each model reads of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_distill.functional.hard_label import IGNORE_INDEX

#: Keys of a mapping under which labels are looked for, the first that is there.
LABEL_KEYS = ("labels", "label", "label_ids")


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch: of a mapping under ``labels``, ``label`` or ``label_ids``, of a pair the second item.

    Args:
        batch: The batch.

    Returns:
        The labels as a tensor; None where there are none.

    Raises:
        TypeError: If they are no numbers.
    """
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if batch.get(key) is not None), None)
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if found is None or isinstance(found, Tensor):
        return found
    try:
        if isinstance(found, (str, bytes)):
            raise TypeError(found)
        return torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        shown = repr(found) if len(repr(found)) < 80 else f"{repr(found)[:80]}..."
        raise TypeError(
            f"Expected the labels of a batch to be numbers, but got a {type(found).__name__}: {shown}. Number the "
            "classes from 0 and give a tensor."
        ) from error


def token_mask(batch: Any) -> Tensor | None:
    """Bool mask ``[B, T]`` of the real tokens of a batch, or None where it says nothing of padding.

    Where a row has several texts, ``input_ids`` ``[B, S, T]``, each is a row of the mask, as the model reads it.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return None
    ids = batch.get("input_ids")
    several = mask.ndim == 3 and isinstance(ids, Tensor) and ids.shape == mask.shape
    return (mask.flatten(0, 1) if several else mask).bool()


def offsets(batch: Any) -> Tensor | None:
    """Where in the text each token of a batch begins and ends ``[B, T, 2]``, or None where it does not say."""
    found = batch.get("offset_mapping") if isinstance(batch, Mapping) else None
    return None if found is None else torch.as_tensor(found)


def ids_of(batch: Any) -> list[Tensor]:
    """The token ids ``[B, T]`` of a batch, those that are answered first: a decoder's, then the input's."""
    given = [batch.get(key) for key in ("decoder_input_ids", "input_ids")] if isinstance(batch, Mapping) else []
    return [ids for ids in given if isinstance(ids, Tensor)]


def decoder_token_mask(batch: Any) -> Tensor | None:
    """Bool mask ``[B, T]`` of the real tokens that the decoder of an encoder-decoder reads; None where nothing says."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("decoder_attention_mask"), labels_of(batch)
    if mask is not None:
        return mask.bool()
    # The decoder reads the labels, moved by one token, so it reads as many real ones as there are labels.
    return None if labels is None or labels.ndim < 2 else labels != IGNORE_INDEX


def has_real_item(batch: Any) -> bool:
    """Whether anything in the batch is no padding."""
    real = token_mask(batch)
    return real is None or bool(real.any())


def batch_of(role: str, batch: Any) -> Any:
    """The batch a model reads: with another tokenizer the teacher has its own, under keys that begin so.

    Args:
        role: ``"student"`` or ``"teacher"``.
        batch: The batch.

    Returns:
        The batch as it is, or for the teacher what its keys ``teacher_...`` hold, under the names without that.

    Example:
        >>> from lightning_distill.models.batch import batch_of
        >>> batch_of("teacher", {"input_ids": 1, "labels": 2, "teacher_input_ids": 3})
        {'input_ids': 3}
    """
    prefix = "teacher_"
    if not isinstance(batch, Mapping) or not any(key.startswith(prefix) for key in batch):
        return batch
    own = {key for key in batch if key.startswith(prefix)}
    if role == "teacher":
        return {key.removeprefix(prefix): batch[key] for key in batch if key in own}
    return {key: value for key, value in batch.items() if key not in own}
