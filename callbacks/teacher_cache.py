"""TeacherCache: the teacher answers once for each row, and its disk after that."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_distill import tasks
from lightning_distill.arguments import between, one_of, typed
from lightning_distill.functional.projection import TopK
from lightning_distill.models.batch import LABEL_KEYS, batch_of, labels_of, token_mask
from lightning_distill.models.calling import gives_logits, taken_names
from lightning_distill.models.class_names import class_names
from lightning_distill.models.heads import LANGUAGE_MODELS, TOKEN_TASKS
from lightning_distill.models.wrapped import inside
from lightning_distill.objectives import SoftTarget
from lightning_distill.signals.signals import Signals
from lightning_distill.teachers.description import shortly
from lightning_distill.teachers.precision import computing_precision
from lightning_distill.teachers.row_keys import count_rows, first_tensor
from lightning_distill.teachers.store import (
    DamagedRows,
    SignalStore,
    cached_teacher,
    check_description,
    model_fingerprint,
    row_keys,
    save_teacher,
    stored_fields,
    tokenizer_fingerprint,
)

Kept = Literal["logits", "hidden_states"]
DType = Literal["float16", "float32"]


@typed
class TeacherCache(L.Callback):
    """Writes the teacher's signals to disk the first time a row is seen, and reads them ever after.

    From the second epoch the teacher does not run. A row is known by a hash of its content and of which of its tokens
    count, so shuffling, other batches, accumulation, resuming and other numbers of processes find what is theirs, and
    data that change in each epoch (augmentation) are new rows each time. Every batch, the first one too, is trained on
    what is in the cache, so the epochs have the same loss.

    With ``top_k`` the log-probabilities of the teacher's best classes are kept for each temperature of a
    :class:`SoftTarget`, and what is missing to 1 is the mass of all others, as :class:`TopKSoftTarget` has it; only
    ``"forward_kl"`` at a constant temperature can be computed of that. With ``top_k=None`` all logits are kept, and in
    float32 every loss is that without a cache.

    The teacher's own answers are kept, in its order of classes, so a cache is good for students of any order. Any
    number of runs and processes may fill one folder at once, each in files of its own, and a cache that was broken off
    goes on where it stopped. Every row has a checksum; one that is damaged is asked for again. A cache of another
    teacher (by its weights and settings), tokenizer, precision or other settings is refused. The room it will take is
    estimated from the first batch, said, and refused where the disk has less.

    Args:
        path: Folder of the cache.
        signals: What is kept: ``"logits"``, and ``"hidden_states"`` of the layers that objectives ask for.
        top_k: Number of classes kept of each prediction; None: all.
        dtype: Type on disk, ``"float16"`` or ``"float32"``.

    Raises:
        ValueError: If an argument is out of its range; at the start of a fit if objectives need what a cache of these
            settings does not keep, the cache is another's, or the disk is too small; in a step if the teacher was not
            loaded (see :meth:`teacher`) and a row is not in the cache.
        TypeError: If the module is no :class:`DistillationModule` with a teacher, or an input of a batch cannot be told
            from another (see :func:`lightning_distill.teachers.row_keys.row_keys`).

    Example:
        >>> import tempfile, lightning as L, torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_distill import DistillationModule
        >>> from lightning_distill.callbacks import TeacherCache
        >>> data = DataLoader(TensorDataset(torch.randn(6, 4), torch.arange(6) % 3), batch_size=2)
        >>> cache = TeacherCache(tempfile.mkdtemp(), top_k=None, dtype="float32")
        >>> quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
        >>> trainer = L.Trainer(max_epochs=2, callbacks=[cache], enable_checkpointing=False, **quiet)
        >>> trainer.fit(DistillationModule(nn.Linear(4, 3), nn.Linear(4, 3)), data)
        >>> cache.hits, cache.misses
        (6, 6)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        signals: Sequence[Kept] = ("logits",),
        top_k: int | None = 64,
        dtype: DType = "float16",
    ) -> None:
        super().__init__()
        if isinstance(signals, str) or "logits" not in signals or not set(signals) <= set(get_args(Kept)):
            raise ValueError(
                f"Expected argument `signals` to hold 'logits' and perhaps 'hidden_states', but got {signals!r}."
            )
        if top_k is not None:
            between("top_k", top_k, 1, closed=True)
        one_of("dtype", dtype, get_args(DType))
        self.path, self.signals, self.top_k, self.dtype = path, tuple(signals), top_k, dtype
        self.hits = self.misses = 0
        self._store: SignalStore | None = None
        self._module: Any = None
        self._place = "teacher_signals"  # the method of the module that it stands in for
        self._ask: Callable[[Any], Signals] | None = None
        self._temperatures: tuple[float, ...] = ()
        self._layers: tuple[int, ...] = ()
        self._whole = True
        self._rows_to_come: int | None = None
        self._first_epoch = 0
        self._read_in_epoch = self._asked_in_epoch = 0
        self._rank = 0

    @staticmethod
    def teacher(path: str | os.PathLike[str]) -> nn.Module:
        """The teacher of a cache, without its weights: a training then needs no memory and no time to load it.

        Args:
            path: Folder of the cache.

        Returns:
            A module to give to :class:`DistillationModule` as the teacher; every row must be in the cache.
        """
        return cached_teacher(path)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stand between the module and its teacher."""
        with trainer.precision_plugin.forward_context():
            self.attach(pl_module, trainer.global_rank)

    def attach(self, module: Any, rank: int = 0) -> None:
        """Stand between a module and its teacher; to be called in the precision of the steps.

        Args:
            module: A :class:`DistillationModule` with a teacher.
            rank: Number of the process.

        Raises:
            TypeError: If the module has no teacher.
            ValueError: If its objectives need what the cache does not keep, or the cache is another's.
        """
        if self._module is not None:
            return
        if getattr(module, "teacher", None) is None or not hasattr(module, "teacher_step"):
            raise TypeError(
                f"Expected callback `TeacherCache` to be used with a `DistillationModule` that has a teacher, but got "
                f"`{type(module).__name__}`. Leave the callback out where there is no teacher."
            )
        if getattr(module, "on_policy", 0):
            raise ValueError(
                f"Expected callback `TeacherCache` to be used with rows that come again, but got `on_policy` "
                f"{module.on_policy}: what a student writes is new each time. Leave the callback out."
            )
        if any(getattr(part, "how", None) == "sample" for part in module.teacher.modules()):
            raise ValueError(
                "Expected callback `TeacherCache` to be used with a teacher that says the same each time, but got an "
                "ensemble that draws one of its teachers (`how='sample'`). Leave the callback out, or use the mean."
            )
        # Imported here, because the module imports the callbacks.
        from lightning_distill.module import DistillationModule

        # Beneath the place where classes are put in the student's order, so that the cache is good for every student.
        # A step of the user's own need not come by there: what it gives is kept, for students of the same classes.
        self._place = "teacher_signals"
        if type(module).teacher_step is not DistillationModule.teacher_step:
            self._place = "teacher_step"
        self._check_objectives(module)
        check_description(self.path, self._settings(module))
        self._module, self._ask, self._rank = module, getattr(module, self._place), rank
        setattr(module, self._place, self._step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Expect new rows in the first epoch."""
        self._first_epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn of the rows that other processes have written."""
        if self._store is not None:
            self._store.refresh()
        if trainer.current_epoch == 0:
            self._rows_to_come = _count_rows(trainer)
        self._read_in_epoch = self._asked_in_epoch = 0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say if the cache spares nothing: it would grow with each epoch, and slow all of them down."""
        if trainer.current_epoch > self._first_epoch and self._asked_in_epoch and not self._read_in_epoch:
            rank_zero_info(
                f"Teacher cache at {self.path}: none of the {self._asked_in_epoch} rows of epoch "
                f"{trainer.current_epoch} was in it. Where data change in each epoch (augmentation), it grows and "
                "spares nothing: leave it out."
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how often the teacher was spared."""
        rank_zero_info(f"Teacher cache at {self.path}: {self.hits} rows read, {self.misses} asked of the teacher.")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Step back."""
        self.detach()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Step back."""
        self.detach()

    def detach(self) -> None:
        """Give the module its teacher back and close the files."""
        if self._module is not None:
            vars(self._module).pop(self._place, None)
        if self._store is not None:
            self._store.close()
        self._module = self._ask = self._store = None

    # -- a step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self, batch: Any) -> Signals:
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
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if self._module.training:
            self._read_in_epoch += len(keys) - len(missing)
            self._asked_in_epoch += len(missing)
        if found is not None:
            return found
        if self._weightless:
            raise ValueError(
                f"Expected the cache at {self.path} to hold every row, but {len(missing)} of a batch of {len(keys)} "
                "are not in it, or damaged. Fill it with the same data, tokenizer, maximal length and seed, or load "
                "the teacher."
            )
        self._fill(batch, keys, frame)
        return self._read(keys, frame)

    def _frame(self, batch: Any) -> Signals:
        """Signals of a batch without anything of a model: its labels, its masks and the shape of its logits."""
        batch, task = batch_of("teacher", batch), self._module.task
        shape: tuple[int, ...] = (count_rows(batch),)
        if task in TOKEN_TASKS:
            labels = labels_of(batch)
            of_tokens = labels if labels is not None and labels.ndim > 1 else first_tensor(batch)
            assert of_tokens is not None
            shape = tuple(of_tokens.shape[:2])
        logits, labels, mask = tasks.align(task, torch.empty(*shape, 0, device=self._module.device), batch)
        return Signals(logits, labels, mask, token_mask(batch))

    def _keys(self, batch: Any, frame: Signals) -> list[bytes]:
        batch, teacher = batch_of("teacher", batch), inside(self._module.teacher)
        if isinstance(batch, Mapping) and self._place == "teacher_signals":
            # What it does not take cannot change its answer; a plain module may call its one input otherwise. One that
            # takes no mask reads the padding too.
            kept = {*(taken_names(teacher, batch) or batch), *LABEL_KEYS}
            batch = {name: value for name, value in batch.items() if name in kept}
        return row_keys(batch, frame.mask, getattr(getattr(teacher, "config", None), "pad_token_id", None))

    @property
    def _weightless(self) -> bool:
        return getattr(self._module.teacher, "cached_fingerprint", None) is not None

    def _missing(self, keys: list[bytes]) -> list[int]:
        return [row for row, key in enumerate(keys) if self._store is None or key not in self._store]

    def _fill(self, batch: Any, keys: list[bytes], frame: Signals) -> None:
        assert self._ask is not None
        answer = self._ask(batch)
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
        if self._rows_to_come is not None:
            rows = max(0, self._rows_to_come - len(self._store))
            needed = self._store.bytes_of(keys) // len(keys) * rows
            self._store.check_room(needed)
            rank_zero_info(f"Teacher cache at {self.path}: about {needed / 1e9:.3f} GB are still to be written.")
            self._rows_to_come = None

    def _fields(self, answer: Signals) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of what is kept of an item."""
        classes = _logits_of_row(answer, 0, self._module.forwards.shared_words).shape[-1]
        fields: dict[str, tuple[str, tuple[int, ...]]] = {"logits": (self.dtype, (classes,))}
        # The best of all, if there are not more, are all.
        if not self._whole and self.top_k is not None and self.top_k < classes:
            kept = self.top_k
            fields = {"log_probs": (self.dtype, (len(self._temperatures), kept)), "classes": ("int32", (kept,))}
        for layer in self._layers:
            fields[f"hidden_{layer}"] = (self.dtype, (answer.hidden_states[layer].shape[-1],))
        return fields

    def _settings(self, module: Any) -> dict[str, Any]:
        """What can be said of the cache before the teacher has answered."""
        return {
            "tokenizer": tokenizer_fingerprint(module.tokenizer),
            "task": module.task,
            "precision": computing_precision(module.teacher_precision),
            "top_k": None if self._whole else self.top_k,
            "dtype": self.dtype,
            "temperatures": [] if self._whole else list(self._temperatures),
            "layers": list(self._layers),
            "words": module.forwards.shared_words,
            "classes": class_names(module.student, "student") if self._place == "teacher_step" else "the teacher's",
        }

    def _open(self, fields: dict[str, tuple[str, tuple[int, ...]]]) -> SignalStore:
        module = self._module
        self._check_fields(fields)
        description = self._settings(module) | {
            "teacher": model_fingerprint(module.teacher),
            "fields": {name: [kind, list(shape)] for name, (kind, shape) in fields.items()},
        }
        store = SignalStore(self.path, description, fields, self._rank)
        save_teacher(module.teacher, store.folder)
        return store

    def _check_fields(self, fields: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        """Refuse a cache that says it keeps what no cache of these settings does."""
        shapes = {name: shape for name, (_, shape) in fields.items()}
        best = "log_probs" in fields and not self._whole
        expected = {"log_probs": self.dtype, "classes": "int32"} if best else {"logits": self.dtype}
        expected |= {f"hidden_{layer}": self.dtype for layer in self._layers}
        fits = {name: kind for name, (kind, _) in fields.items()} == expected
        if fits and best:
            fits = shapes["log_probs"] == (len(self._temperatures), self.top_k) and shapes["classes"] == (self.top_k,)
        elif fits:
            fits = len(shapes["logits"]) == 1 and self._classes in (None, *shapes["logits"])
        if not fits or not all(len(shapes[f"hidden_{layer}"]) == 1 for layer in self._layers):
            raise ValueError(
                f"Expected argument `path` to be a cache with the fields {sorted(expected)} of these objectives and "
                f"models, but got {shortly(fields, 300)}: {self.path}. Delete the folder and fill it again."
            )

    @property
    def _classes(self) -> int | None:
        """Number of classes, where the student's config says it; a vocabulary may be padded."""
        config = getattr(self._module.student, "config", None)
        if self._module.task in LANGUAGE_MODELS or not gives_logits(self._module.teacher):
            return None
        known = getattr(config, "num_labels", None)
        # One logit of a classifier is kept as two, see `tasks.align`.
        return 2 if known == 1 and self._module.task != "regression" else known

    def _arrays(self, answer: Signals, row: int) -> dict[str, "np.ndarray[Any, Any]"]:
        """What is kept of a row, of its items that count."""
        logits = _logits_of_row(answer, row, self._module.forwards.shared_words)
        largest = torch.finfo(getattr(torch, self.dtype)).max
        assert self._store is not None
        if "logits" in self._store.fields:
            found = {"logits": logits.clamp(-largest, largest)}
        else:
            assert self.top_k is not None
            classes = logits.topk(self.top_k, -1).indices
            softened = [(logits / t).log_softmax(-1).gather(-1, classes) for t in self._temperatures]
            found = {"log_probs": torch.stack(softened, 1).clamp(min=-largest), "classes": classes}
        for layer in self._layers:
            states = answer.hidden_states[layer][row]
            found[f"hidden_{layer}"] = states if answer.token_mask is None else states[answer.token_mask[row]]
        return {name: (x.float() if x.is_floating_point() else x).cpu().numpy() for name, x in found.items()}

    def _read(self, keys: list[bytes], frame: Signals) -> Signals:
        store = self._store
        assert store is not None
        of_answers = [1] * len(keys) if frame.mask is None else frame.mask.sum(1).tolist()
        counts = dict.fromkeys(("logits", "log_probs", "classes"), of_answers)
        if frame.token_mask is not None:
            counts |= {f"hidden_{layer}": frame.token_mask.sum(1).tolist() for layer in self._layers}
        device, shape = frame.logits.device, frame.logits.shape[:-1]
        arrays = {name: value.to(device) for name, value in store.read(keys, counts).items()}
        found = dataclasses.replace(frame)
        if "logits" in arrays:
            found.logits = _spread(arrays["logits"].float(), frame.mask, shape)
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
            found.top_k = {t: TopK(log_probs[..., i, :], classes) for i, t in enumerate(self._temperatures)}
        hidden_shape = torch.Size([len(keys), -1])
        found.hidden_states = {
            layer: _spread(arrays[f"hidden_{layer}"].float(), frame.token_mask, hidden_shape) for layer in self._layers
        }
        return found

    # -- before the first step ---------------------------------------------------------------------------------------

    def _check_objectives(self, module: Any) -> None:
        objectives = [objective for objective in module.objectives.values() if objective.needs_teacher]
        self._whole = self.top_k is None or module.task == "regression"
        self._layers = tuple(sorted({layer for o in objectives for layer in o.teacher_request.hidden_states}))
        for objective in objectives:
            request = objective.teacher_request
            if request.attention or request.modules or request.embedding:
                raise ValueError(
                    f"Expected the objectives to read logits and hidden states alone, but got `{objective.name}`, "
                    "which reads what `TeacherCache` does not keep. Leave it or the cache out."
                )
            if request.hidden_states and "hidden_states" not in self.signals:
                raise ValueError(
                    f"Expected argument `signals` to hold 'hidden_states' for the objective `{objective.name}`, but "
                    f"got {list(self.signals)}."
                )
        if self._whole:
            return
        temperatures = []
        for objective in objectives:
            if not objective.reads_logits:
                continue
            if not (isinstance(objective, SoftTarget) and objective.divergence == "forward_kl"):
                raise ValueError(
                    f"Expected argument `top_k` to be None for the objective `{objective.name}`, but got {self.top_k}: "
                    "of the best classes alone, only the forward KL divergence of `SoftTarget` can be computed."
                )
            if callable(objective._temperature):
                raise ValueError(
                    f"Expected argument `top_k` to be None for a temperature that changes, as that of "
                    f"`{objective.name}`, but got {self.top_k}: the mass of the other classes is kept for one."
                )
            temperatures.append(objective.temperature)
        self._temperatures = tuple(sorted(set(temperatures))) or (1.0,)


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


def _count_rows(trainer: L.Trainer) -> int | None:
    """Rows of an epoch over all processes, training and validation, as far as the data know."""
    rows = 0
    for loader in (trainer.train_dataloader, trainer.val_dataloaders):
        size = getattr(getattr(loader, "dataset", None), "__len__", None)
        rows += size() if size is not None else 0
    return rows or None
