"""A teacher's signals on disk: asked of the teacher the first time a row is seen, and read ever after."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_distill.functional.projection import TopK
from lightning_distill.models.batch import LABEL_KEYS, batch_of, ids_of, labels_of, token_mask
from lightning_distill.models.calling import gives_logits, labels_read, taken_names
from lightning_distill.models.class_names import class_names
from lightning_distill.models.fingerprints import model_fingerprint, tokenizer_fingerprint
from lightning_distill.models.wrapped import inside
from lightning_distill.signals.signals import Signals
from lightning_distill.tasks import TASKS
from lightning_distill.teachers.cache.format import shortly, stored_fields
from lightning_distill.teachers.cache.row_keys import count_rows, first_tensor, row_keys
from lightning_distill.teachers.cache.store import DamagedRows, SignalStore
from lightning_distill.teachers.cache.teacher import save_teacher
from lightning_distill.teachers.precision import computing_precision

Fields = dict[str, tuple[str, tuple[int, ...]]]


@dataclass
class CacheCount:
    """Rows that were read from a cache and asked of its teacher, in all and in the training of this epoch."""

    hits: int = 0
    misses: int = 0
    hits_in_epoch: int = 0
    misses_in_epoch: int = 0

    def begin_epoch(self) -> None:
        """Begin another epoch."""
        self.hits_in_epoch = self.misses_in_epoch = 0

    def add(self, hits: int, misses: int, *, training: bool) -> None:
        """Add a batch."""
        self.hits += hits
        self.misses += misses
        if training:
            self.hits_in_epoch += hits
            self.misses_in_epoch += misses


@dataclass(frozen=True)
class KeptSignals:
    """What a cache keeps of each item.

    Args:
        dtype: Of numbers on disk.
        layers: Those whose hidden states are kept.
        top_k: Number of classes; None: all logits.
        temperatures: Those at which the best classes' log-probabilities are kept.
    """

    dtype: str
    layers: tuple[int, ...] = ()
    top_k: int | None = None
    temperatures: tuple[float, ...] = ()


def described(module: Any, kept: KeptSignals) -> dict[str, Any]:
    """What can be said of a cache before the teacher has answered.

    Args:
        module: A DistillationModule.
        kept: What is kept.
    """
    # In the teacher's own order a cache is good for every student; a step of the user's own has the student's.
    own_order = module.teacher_source_has_own_order
    return {
        "tokenizer": tokenizer_fingerprint(module.tokenizer),
        "task": module.task,
        "precision": computing_precision(module.teacher_precision),
        "top_k": kept.top_k,
        "dtype": kept.dtype,
        "temperatures": list(kept.temperatures),
        "layers": list(kept.layers),
        "words": module.forwards.shared_vocab_size,
        "classes": "the teacher's" if own_order else class_names(module.student, "student"),
    }


class CachedSignals:
    """Stands before a teacher: gives the signals of a batch from the disk, where they are, and puts them there if not.

    Args:
        path: Folder of the cache.
        module: A DistillationModule, whose ``teacher_source`` is asked for rows that are not there.
        kept: What is kept of each.
        count: Is told of every row.
        rank: Number of the process.
    """

    def __init__(
        self, path: str | os.PathLike[str], module: Any, kept: KeptSignals, count: CacheCount, rank: int = 0
    ) -> None:
        self.path, self.kept, self.count = path, kept, count
        #: What is asked for rows that are not there.
        self.source: Callable[[Any], Signals] = module.teacher_source
        #: Rows of the first epoch, to say how much room they will take; None once it is said.
        self.rows_to_come: int | None = None
        self._module, self._rank = module, rank
        self._task = TASKS[module.task]
        self._store: SignalStore | None = None

    def refresh(self) -> None:
        """Learn of the rows that other processes have written."""
        if self._store is not None:
            self._store.refresh()

    def close(self) -> None:
        """Close the files."""
        if self._store is not None:
            self._store.close()
        self._store = None

    @torch.no_grad()
    def __call__(self, batch: Any) -> Signals:
        """The signals of a batch.

        Raises:
            ValueError: If the teacher was not loaded and a row is not there.
        """
        frame = self._frame(batch)
        keys = self._keys(batch, frame)
        if self._store is None and (fields := stored_fields(self.path)) is not None:
            self._store = self._open(fields)
        missing = self._missing(keys)
        if missing and self._store is not None:
            # Another process may have written them since.
            self._store.refresh()
            missing = self._missing(keys)
        found = None
        if not missing:
            try:
                found = self._read(keys, frame)
            except DamagedRows:
                missing = self._missing(keys)
        self.count.add(len(keys) - len(missing), len(missing), training=self._module.training)
        if found is not None:
            return found
        if getattr(self._module.teacher, "cached_fingerprint", None) is not None:  # it has no weights
            raise ValueError(
                f"Expected the cache at {self.path} to hold every row, but {len(missing)} of a batch of {len(keys)} "
                "are not in it, or damaged. Fill it with the same data, tokenizer, maximal length and seed, or load "
                "the teacher."
            )
        self._fill(batch, keys, frame)
        return self._read(keys, frame)

    def _frame(self, batch: Any) -> Signals:
        """Signals of a batch without anything of a model: its labels, its masks and the shape of its logits."""
        batch, task = batch_of("teacher", batch), self._task
        if self.kept.layers and (first := first_tensor(batch)) is not None and task.of_vectors and first.ndim > 2:
            raise ValueError(
                "Expected rows of one text beside `TeacherCache`, which keeps hidden states by row, but got rows of "
                f"{first.shape[1]} texts. Leave the objectives on hidden states out, or the cache."
            )
        shape: tuple[int, ...] = (count_rows(batch),)
        if task.of_tokens:
            of_tokens = next((x for x in (labels_of(batch), *ids_of(batch)) if x is not None and x.ndim > 1), None)
            of_tokens = first_tensor(batch) if of_tokens is None else of_tokens
            assert of_tokens is not None
            shape = tuple(of_tokens.shape[:2])
        logits, labels, mask = task.align(torch.empty(*shape, 0, device=self._module.device), batch)
        return Signals(task.packed(logits), labels, mask, token_mask(batch))

    def _keys(self, batch: Any, frame: Signals) -> list[bytes]:
        batch, teacher = batch_of("teacher", batch), inside(self._module.teacher)
        read = labels_read(teacher, batch)
        if isinstance(batch, Mapping) and self._module.teacher_source_has_own_order:
            # What it does not take cannot change its answer; a plain module may call its one input otherwise. One that
            # takes no mask reads the padding too.
            kept = {*(taken_names(teacher, batch) or batch), *LABEL_KEYS}
            batch = {name: value for name, value in batch.items() if name in kept}
        return row_keys(batch, frame.mask, getattr(getattr(teacher, "config", None), "pad_token_id", None), read)

    def _missing(self, keys: list[bytes]) -> list[int]:
        return [row for row, key in enumerate(keys) if self._store is None or key not in self._store]

    def _fill(self, batch: Any, keys: list[bytes], frame: Signals) -> None:
        answer = self.source(batch)
        answer = dataclasses.replace(answer, logits=self._task.packed(answer.logits))
        given = answer.logits if answer.deferred is None else answer.deferred.hidden
        if given.shape[:-1] != frame.logits.shape[:-1]:
            raise ValueError(
                "Expected the teacher beside `TeacherCache` to give logits of shape "
                f"{[*frame.logits.shape[:-1], 'classes']} for a batch, but got {list(given.shape)}. Each row, or "
                "token, needs one answer; leave the cache out of other tasks."
            )
        if self._store is None:
            self._store = self._open(self._fields(answer))
        for row in self._missing(keys):
            self._store.write(keys[row], self._arrays(answer, row))
        if self.rows_to_come is not None:
            rows = max(0, self.rows_to_come - len(self._store))
            needed = self._store.bytes_of(keys) // len(keys) * rows
            self._store.check_room(needed)
            rank_zero_info(f"Teacher cache at {self.path}: about {needed / 1e9:.3f} GB are still to be written.")
            self.rows_to_come = None

    def _fields(self, answer: Signals) -> Fields:
        """Type and shape of what is kept of an item."""
        classes = _logits_of_row(answer, 0, self._module.forwards.shared_vocab_size).shape[-1]
        fields: Fields = {"logits": (self.kept.dtype, (classes,))}
        # The best of all, if there are not more, are all.
        if self.kept.top_k is not None and self.kept.top_k < classes:
            kept = self.kept.top_k
            fields = {
                "log_probs": (self.kept.dtype, (len(self.kept.temperatures), kept)),
                "classes": ("int32", (kept,)),
            }
        for layer in self.kept.layers:
            fields[f"hidden_{layer}"] = (self.kept.dtype, (answer.hidden_states[layer].shape[-1],))
        return fields

    def _open(self, fields: Fields) -> SignalStore:
        module = self._module
        self._check_fields(fields)
        description = described(module, self.kept) | {
            "teacher": model_fingerprint(module.teacher),
            "fields": {name: [kind, list(shape)] for name, (kind, shape) in fields.items()},
        }
        store = SignalStore(self.path, description, fields, self._rank)
        save_teacher(module.teacher, store.folder)
        return store

    def _check_fields(self, fields: Fields) -> None:
        """Refuse a cache that says it keeps what no cache of these settings does."""
        shapes = {name: shape for name, (_, shape) in fields.items()}
        best = "log_probs" in fields and self.kept.top_k is not None
        expected = {"log_probs": self.kept.dtype, "classes": "int32"} if best else {"logits": self.kept.dtype}
        expected |= {f"hidden_{layer}": self.kept.dtype for layer in self.kept.layers}
        fits = {name: kind for name, (kind, _) in fields.items()} == expected
        if fits and best:
            fits = shapes["log_probs"] == (len(self.kept.temperatures), self.kept.top_k) and shapes["classes"] == (
                self.kept.top_k,
            )
        elif fits:
            fits = len(shapes["logits"]) == 1 and self._classes in (None, *shapes["logits"])
        if not fits or not all(len(shapes[f"hidden_{layer}"]) == 1 for layer in self.kept.layers):
            raise ValueError(
                f"Expected argument `path` to be a cache with the fields {sorted(expected)} of these objectives and "
                f"models, but got {shortly(fields, 300)}: {self.path}. Delete the folder and fill it again."
            )

    @property
    def _classes(self) -> int | None:
        """Number of classes, where the student's config says it; a vocabulary may be padded."""
        config = getattr(self._module.student, "config", None)
        if self._task.of_words or self._task.of_vectors or not gives_logits(self._module.teacher):
            return None
        known = getattr(config, "num_labels", None)
        # One logit of a classifier is kept as two, see `Task.align`.
        return 2 if known == 1 and self._task.exclusive else known

    def _arrays(self, answer: Signals, row: int) -> dict[str, "np.ndarray[Any, Any]"]:
        """What is kept of a row, of its items that count."""
        logits = _logits_of_row(answer, row, self._module.forwards.shared_vocab_size)
        largest = torch.finfo(getattr(torch, self.kept.dtype)).max
        assert self._store is not None
        if "logits" in self._store.fields:
            found = {"logits": logits.clamp(-largest, largest)}
        else:
            assert self.kept.top_k is not None
            classes = logits.topk(self.kept.top_k, -1).indices
            softened = [(logits / t).log_softmax(-1).gather(-1, classes) for t in self.kept.temperatures]
            found = {"log_probs": torch.stack(softened, 1).clamp(min=-largest), "classes": classes}
        for layer in self.kept.layers:
            states = answer.hidden_states[layer][row]
            found[f"hidden_{layer}"] = states if answer.token_mask is None else states[answer.token_mask[row]]
        return {name: (x.float() if x.is_floating_point() else x).cpu().numpy() for name, x in found.items()}

    def _read(self, keys: list[bytes], frame: Signals) -> Signals:
        store = self._store
        assert store is not None
        of_answers = [1] * len(keys) if frame.mask is None else frame.mask.flatten(1).sum(1).tolist()
        counts = dict.fromkeys(("logits", "log_probs", "classes"), of_answers)
        if frame.token_mask is not None:
            counts |= {f"hidden_{layer}": frame.token_mask.sum(1).tolist() for layer in self.kept.layers}
        device, shape = frame.logits.device, frame.logits.shape[:-1]
        arrays = {name: value.to(device) for name, value in store.read(keys, counts).items()}
        found = dataclasses.replace(frame)
        if "logits" in arrays:
            found.logits = self._task.unpacked(_spread(arrays["logits"].float(), frame.mask, shape))
        else:
            log_probs = _spread(arrays["log_probs"].float(), frame.mask, shape)
            classes = arrays["classes"].long()  # in int32 there is no 2**31
            most = self._classes or getattr(getattr(self._module.student, "config", None), "vocab_size", None) or 2**31
            if classes.numel() and not 0 <= classes.min() <= classes.max() < most:
                raise ValueError(
                    f"Expected the cache at {self.path} to hold classes from 0 to {most - 1}, but got others. Delete "
                    "the folder and fill it again."
                )
            classes = _spread(classes, frame.mask, shape)
            found.top_k = {t: TopK(log_probs[..., i, :], classes) for i, t in enumerate(self.kept.temperatures)}
        hidden_shape = torch.Size([len(keys), -1])
        found.hidden_states = {
            layer: _spread(arrays[f"hidden_{layer}"].float(), frame.token_mask, hidden_shape)
            for layer in self.kept.layers
        }
        return found


def _logits_of_row(answer: Signals, row: int, words: int | None) -> Tensor:
    """Logits ``[items, C]`` of what counts in a row, in float32."""
    items = slice(None) if answer.mask is None else answer.mask[row]
    if answer.deferred is not None:
        head, hidden = answer.deferred.head, answer.deferred.hidden
        return head.projection(hidden[row][items]).logits()[..., :words]
    logits = answer.logits[row]
    return (logits[None] if logits.ndim == 1 else logits[items]).float()


def _spread(values: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
    """Items back at their places; 0 where nothing counts."""
    if mask is None:
        return values.reshape(*shape, *values.shape[1:])
    return values.new_zeros(*mask.shape, *values.shape[1:]).index_put((mask,), values)
