"""Keys of a batch's rows: a hash of whatever of it can change what a model answers."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_distill.models.batch import LABEL_KEYS, batch_of, labels_of

#: Bytes of a key.
SIZE = 16

# Inputs with an item for each token, of which those behind the last real one are nobody's.
_OF_TOKENS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "bbox")
_PLAIN = (str, bytes, bool, int, float, complex, type(None), np.generic, torch.dtype, torch.device, PurePath)


class _Leaf(NamedTuple):
    """An input, its type, and its content: of each row (one entry a row), or of the whole batch."""

    name: str
    kind: str
    of_rows: bool
    content: Any


def row_keys(batch: Any, mask: Tensor | None, padding: int | None = None, read: Tensor | None = None) -> list[bytes]:
    """A hash of each row's content: of its inputs as far as they are real, and of which of its items count.

    Padding behind the tokens is left out, so a row has the same key in every batch. A mask with holes, or one that
    begins with padding, moves the tokens: then all of the row is in its key, and the mask. Inputs may be nested
    (mappings, sequences, dataclasses) and hold texts and numbers; what belongs to no row is in the key of each.

    Args:
        batch: A mapping with tensors, or a pair ``(inputs, labels)``.
        mask: Bool ``[B, T]``, the items that count, or None.
        padding: The id that the model takes for padding, if it has one; a row that is padded with another is hashed
            whole, as a model may look for its last token by that id.
        read: Integers ``[B, T]``, the labels that a decoder reads, or None; the mask is then theirs.

    Returns:
        One key of 16 bytes a row.

    Raises:
        TypeError: If there is an input whose content cannot be told; the message names it.
        ValueError: If there is nothing to tell the number of rows from.

    Example:
        >>> import torch
        >>> from lightning_distill.teachers.cache.row_keys import row_keys
        >>> short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2)}
        >>> padded = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> row_keys(short, None) == row_keys(padded, None)
        True
    """
    batch = batch_of("teacher", batch)
    rows = count_rows(batch)
    inputs, attention_mask = _inputs(batch), None
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        attention_mask = batch.get("attention_mask")
    leaves = list(_leaves((), inputs, rows))
    whole = list(_leaves(("attention_mask",), attention_mask, rows))
    # Of several texts a row, what is behind the longest is left out, and the mask says the rest.
    several = isinstance(attention_mask, Tensor) and attention_mask.ndim == 3
    lengths = (_columns if several else _lengths)(batch, attention_mask, padding)
    counts = None if mask is None else mask.cpu().numpy()
    keys = []
    for row in range(rows):
        items = None if counts is None else np.flatnonzero(counts[row])
        length = None if lengths is None else lengths[row]
        by_length = length is not None and read is None and not several
        if by_length and items is not None and items.size and items[-1] >= length:
            length = None  # something that is no token counts
        digest = hashlib.blake2b(digest_size=SIZE)
        for leaf in [*leaves, *whole] if length is None or several else leaves:
            content = leaf.content[row] if leaf.of_rows else leaf.content
            if length is not None and several and leaf.of_rows:
                assert attention_mask is not None
                content = content[:, :length] if content.shape[:2] == attention_mask.shape[1:] else content
            elif length is not None and leaf.name in _OF_TOKENS and leaf.of_rows:
                assert attention_mask is not None  # it is what says the length
                content = content[:length] if content.shape[:1] == attention_mask.shape[1:] else content
            _add(digest, leaf.name + leaf.kind, content)
        _add(digest, "items", "all" if items is None else items.astype(np.int64))
        if read is not None:
            _add(digest, "read", read[row].cpu().numpy().astype(np.int64)[... if items is None else items])
        keys.append(digest.digest())
    return keys


def count_rows(batch: Any) -> int:
    """Number of rows of a batch: of its labels, its ``input_ids``, or the first tensor in it.

    Args:
        batch: A batch as a module takes it.

    Raises:
        ValueError: If there is none of them.
    """
    if (labels := labels_of(batch)) is not None and labels.ndim:
        return len(labels)
    if (first := first_tensor(batch)) is not None:
        return len(first)
    raise ValueError(
        "Expected a batch with labels or a tensor, whose first dimension is that of the rows, but got "
        f"{type(batch).__name__} without. Give the inputs as tensors, or leave `TeacherCache` out."
    )


def first_tensor(batch: Any) -> Tensor | None:
    """The ``input_ids`` of a batch, or its first input that has rows; None if there is none."""
    inputs = _inputs(batch)
    if isinstance(inputs, Mapping) and isinstance(ids := inputs.get("input_ids"), Tensor):
        return ids
    return next((value for value in _tensors(inputs) if value.ndim), None)


def _inputs(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in LABEL_KEYS}
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif (parts := _parts(value)) is not None:
        for part in parts.values():
            yield from _tensors(part)


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by name or place; None for anything else."""
    if isinstance(value, Mapping):
        return dict(sorted(value.items(), key=lambda item: str(item[0])))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(enumerate(value)) if isinstance(value, (tuple, list)) else None


def _leaves(path: tuple[Any, ...], value: Any, rows: int) -> Iterator[_Leaf]:
    name = ".".join(map(str, path))
    if isinstance(value, Tensor) and value.is_nested:
        value = list(value.unbind())
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if (parts := _parts(value)) is not None:
        if isinstance(value, (tuple, list)) and len(value) == rows:
            # One entry a row, unless there are tensors of all rows in it: what could be either is in each key whole.
            stacked = any(tensor.shape[:1] == (rows,) for tensor in _tensors(value))
            contents = [[_kind(part), _content((*path, place), part)] for place, part in enumerate(value)]
            yield _Leaf(name, "", not stacked, contents)
            return
        yield _Leaf(name, "", False, [str(part) for part in parts])
        for place, part in parts.items():
            yield from _leaves((*path, place), part, rows)
        return
    content = _content(path, value)
    # Some models have positions of three axes before the rows.
    of_rows = isinstance(content, np.ndarray) and content.ndim > 1 and len(content) == rows
    yield _Leaf(name, _kind(value), of_rows and not (name == "position_ids" and content.ndim == 4), content)


def _kind(value: Any) -> str:
    return f"{getattr(value, 'dtype', '')}"


def _content(path: tuple[Any, ...], value: Any) -> Any:
    """The bytes of a value, in the shape of a tensor with one more dimension; of anything else what it says."""
    if isinstance(value, Tensor) and not value.is_meta:
        value = value.detach()
        value = value.to_dense() if value.layout is not torch.strided else value
        value = value.dequantize() if value.is_quantized else value
        value = value.resolve_conj().resolve_neg().cpu().contiguous()
        # Bytes, as numpy does not know all types.
        return value.unsqueeze(-1).view(torch.uint8).numpy()
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    if (parts := _parts(value)) is not None:
        return [[str(place), _kind(part), _content((*path, place), part)] for place, part in parts.items()]
    if not isinstance(value, Tensor) and (hasattr(value, "__array__") or hasattr(value, "__array_interface__")):
        array = np.ascontiguousarray(value)
        if array.dtype != object:
            return array[..., None].view(np.uint8)
    raise TypeError(
        "Expected the inputs of a batch beside `TeacherCache` to be tensors, numbers or texts, in mappings, sequences "
        f"or dataclasses, but got `{type(value).__name__}` at `{'.'.join(map(str, path)) or 'inputs'}`: what is in it "
        "cannot be told from another. Leave it out of the batch, or leave the cache out."
    )


def _add(digest: Any, name: str, content: Any) -> None:
    if isinstance(content, np.ndarray):
        digest.update(f"{name!r}{content.shape}".encode(errors="surrogatepass"))
        digest.update(np.ascontiguousarray(content).data if content.size else b"")
    elif isinstance(content, list):
        digest.update(f"{name!r}[{len(content)}]".encode(errors="surrogatepass"))
        for part in content:
            _add(digest, "", part)
    else:
        text = content.encode(errors="surrogatepass")
        digest.update(f"{name!r}{len(text)}:".encode(errors="surrogatepass") + text)


def _columns(batch: Any, mask: Any, padding: int | None) -> list[int | None]:
    """Number of tokens of the longest text of each row ``[S, T]``; None where something else than padding is behind."""
    real = mask.cpu() != 0
    places = torch.arange(1, real.shape[2] + 1)
    lengths = (real * places).amax((1, 2))
    ids = batch.get("input_ids")
    if padding is None or not isinstance(ids, Tensor) or ids.shape != mask.shape:
        return list(map(int, lengths))
    padded = ((ids.cpu() == padding) | (places <= lengths[:, None, None])).all(2).all(1)
    return [int(length) if run else None for length, run in zip(lengths, padded, strict=True)]


def _lengths(batch: Any, mask: Any, padding: int | None) -> list[int | None] | None:
    """Number of real tokens of each row whose padding is behind them; None of the others. None without such a mask."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    real = mask.cpu()
    counts = (real != 0).sum(1)
    runs = (real == (torch.arange(real.shape[1]) < counts[:, None])).all(1) & (counts > 0)
    ids = batch.get("input_ids")
    if padding is not None and isinstance(ids, Tensor) and ids.shape == mask.shape:
        runs &= ((ids.cpu() == padding) | (real != 0)).all(1)
    return [int(count) if run else None for count, run in zip(counts, runs, strict=True)]
