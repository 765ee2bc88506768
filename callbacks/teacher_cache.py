"""TeacherCache: the teacher answers once for each row, and its disk after that."""

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
from lightning_distill.cache import (
    SignalStore,
    cached_teacher,
    check_description,
    model_fingerprint,
    row_keys,
    save_teacher,
    stored_fields,
    tokenizer_fingerprint,
)
from lightning_distill.class_names import class_names
from lightning_distill.functional.projection import TopK
from lightning_distill.objectives import SoftTarget
from lightning_distill.signals import Signals

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

    A cache that was broken off goes on where it stopped. One of another teacher (by its weights), tokenizer or other
    settings is refused. The room it will take is estimated from the first batch, said, and refused where the disk has
    less.

    Args:
        path: Folder of the cache.
        signals: What is kept: ``"logits"``, and ``"hidden_states"`` of the layers that objectives ask for.
        top_k: Number of classes kept of each prediction; None: all.
        dtype: Type on disk, ``"float16"`` or ``"float32"``.

    Raises:
        ValueError: If an argument is out of its range; at the start of a fit if objectives need what a cache of these
            settings does not keep, the cache is another's, or the disk is too small; in a step if the teacher was not
            loaded (see :meth:`teacher`) and a row is not in the cache.
        TypeError: If the module is no :class:`DistillationModule` with a teacher.

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
        self.attach(pl_module, trainer.global_rank)

    def attach(self, module: Any, rank: int = 0) -> None:
        """Stand between a module and its teacher.

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
        frame = _frame(self._module.task, batch)
        keys = row_keys(batch, frame.mask)
        if self._store is None and (fields := stored_fields(self.path)) is not None:
            self._store = self._open(fields)
        missing = self._missing(keys)
        if missing and self._store is not None:
            # Another process may have written them since.
            self._store.refresh()
            missing = self._missing(keys)
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if self._module.training:
            self._read_in_epoch += len(keys) - len(missing)
            self._asked_in_epoch += len(missing)
        if missing and self._weightless:
            raise ValueError(
                f"Expected the cache at {self.path} to hold every row, but {len(missing)} of a batch of {len(keys)} "
                "are not in it. Fill it with the same data, tokenizer, maximal length and seed, or load the teacher."
            )
        if missing:
            self._fill(batch, keys)
        assert self._store is not None
        return self._read(self._store, keys, frame)

    @property
    def _weightless(self) -> bool:
        return getattr(self._module.teacher, "cached_fingerprint", None) is not None

    def _missing(self, keys: list[bytes]) -> list[int]:
        return [row for row, key in enumerate(keys) if self._store is None or key not in self._store]

    def _fill(self, batch: Any, keys: list[bytes]) -> None:
        assert self._ask is not None
        answer = self._ask(batch)
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
        if not self._whole:
            kept = min(self.top_k or classes, classes)
            fields = {"log_probs": (self.dtype, (len(self._temperatures), kept)), "classes": ("int32", (kept,))}
        for layer in self._layers:
            fields[f"hidden_{layer}"] = (self.dtype, (answer.hidden_states[layer].shape[-1],))
        return fields

    def _settings(self, module: Any) -> dict[str, Any]:
        """What can be said of the cache before the teacher has answered."""
        return {
            "tokenizer": tokenizer_fingerprint(module.tokenizer),
            "task": module.task,
            "top_k": None if self._whole else self.top_k,
            "dtype": self.dtype,
            "temperatures": [] if self._whole else list(self._temperatures),
            "layers": list(self._layers),
            "classes": class_names(module.student, "student") if self._place == "teacher_step" else "the teacher's",
        }

    def _open(self, fields: dict[str, tuple[str, tuple[int, ...]]]) -> SignalStore:
        module = self._module
        description = self._settings(module) | {
            "teacher": model_fingerprint(module.teacher),
            "fields": {name: [kind, list(shape)] for name, (kind, shape) in fields.items()},
        }
        store = SignalStore(self.path, description, fields, self._rank)
        save_teacher(module.teacher, store.folder)
        return store

    def _arrays(self, answer: Signals, row: int) -> dict[str, "np.ndarray[Any, Any]"]:
        """What is kept of a row, of its items that count."""
        logits = _logits_of_row(answer, row, self._module.forwards.shared_words)
        largest = torch.finfo(getattr(torch, self.dtype)).max
        if self._whole:
            found = {"logits": logits.clamp(-largest, largest)}
        else:
            classes = logits.topk(min(self.top_k or 1, logits.shape[-1]), -1).indices
            softened = [(logits / t).log_softmax(-1).gather(-1, classes) for t in self._temperatures]
            found = {"log_probs": torch.stack(softened, 1).clamp(min=-largest), "classes": classes}
        for layer in self._layers:
            states = answer.hidden_states[layer][row]
            found[f"hidden_{layer}"] = states if answer.token_mask is None else states[answer.token_mask[row]]
        return {name: (x.float() if x.is_floating_point() else x).cpu().numpy() for name, x in found.items()}

    def _read(self, store: SignalStore, keys: list[bytes], frame: Signals) -> Signals:
        arrays = {name: value.to(frame.logits.device) for name, value in store.read(keys).items()}
        shape = frame.logits.shape[:-1]
        if self._whole:
            frame.logits = _spread(arrays["logits"].float(), frame.mask, shape)
        else:
            log_probs = _spread(arrays["log_probs"].float(), frame.mask, shape)
            classes = _spread(arrays["classes"].long(), frame.mask, shape)
            frame.top_k = {t: TopK(log_probs[..., i, :], classes) for i, t in enumerate(self._temperatures)}
        for layer in self._layers:
            states = arrays[f"hidden_{layer}"].float()
            frame.hidden_states[layer] = _spread(states, frame.token_mask, torch.Size([len(keys), -1]))
        return frame

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


def _frame(task: tasks.Task, batch: Any) -> Signals:
    """Signals of a batch without anything of a model: its labels, its masks and the shape of its logits."""
    batch = tasks.batch_of("teacher", batch)
    if isinstance(batch, Mapping):
        first = next(value for key, value in batch.items() if key != "labels" and isinstance(value, Tensor))
        first = batch.get("input_ids", first)
    else:
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
    shape = first.shape[:2] if task in tasks.TOKEN_TASKS else first.shape[:1]
    logits, labels, mask = tasks.align(task, torch.empty(*shape, 0, device=first.device), batch)
    return Signals(logits, labels, mask, tasks.token_mask(batch))


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
