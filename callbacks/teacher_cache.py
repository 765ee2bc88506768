"""TeacherCache: the teacher answers once for each row, and its disk after that."""

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_distill.arguments import between, one_of, typed
from lightning_distill.tasks import TASKS
from lightning_distill.teachers.cache.format import check_description
from lightning_distill.teachers.cache.signals import CacheCount, CachedSignals, KeptSignals, described
from lightning_distill.teachers.cache.teacher import cached_teacher

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
            from another (see :func:`lightning_distill.teachers.cache.row_keys.row_keys`).

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
        self._module: Any = None
        self._cached: CachedSignals | None = None
        self._before: Any = None  # what answered in the teacher's place before
        self._count = CacheCount()
        self._first_epoch = 0

    @property
    def hits(self) -> int:
        """Rows that were read."""
        return self._count.hits

    @property
    def misses(self) -> int:
        """Rows that the teacher was asked for."""
        return self._count.misses

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
        if self._cached is not None:
            return
        if getattr(module, "teacher", None) is None or not hasattr(module, "teacher_source"):
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
        kept = self._kept(module)
        check_description(self.path, described(module, kept))
        self._before = module._teacher_source
        self._module, self._cached = module, CachedSignals(self.path, module, kept, self._count, rank)
        module._teacher_source = self._cached

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Expect new rows in the first epoch."""
        self._first_epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn of the rows that other processes have written."""
        assert self._cached is not None
        self._cached.refresh()
        if trainer.current_epoch == 0:
            self._cached.rows_to_come = _count_rows(trainer)
        self._count.begin_epoch()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say if the cache spares nothing: it would grow with each epoch, and slow all of them down."""
        count = self._count
        if trainer.current_epoch > self._first_epoch and count.misses_in_epoch and not count.hits_in_epoch:
            rank_zero_info(
                f"Teacher cache at {self.path}: none of the {count.misses_in_epoch} rows of epoch "
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
        if self._cached is not None:
            self._module._teacher_source = self._before
            self._cached.close()
        self._module = self._cached = None

    # -- before the first step ---------------------------------------------------------------------------------------

    def _kept(self, module: Any) -> KeptSignals:
        """What is kept for the objectives of a module; an error if they need more."""
        objectives = [objective for objective in module.objectives.values() if objective.needs_teacher]
        layers = tuple(sorted({layer for o in objectives for layer in o.teacher_request.hidden_states}))
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
        if self.top_k is None or not TASKS[module.task].exclusive:
            return KeptSignals(self.dtype, layers)
        temperatures: set[float] = set()
        for objective in objectives:
            if not objective.reads_logits:
                continue
            if objective.top_k_temperatures is None:
                raise ValueError(
                    f"Expected argument `top_k` to be None for the objective `{objective.name}`, but got {self.top_k}: "
                    "of the best classes alone, only the forward KL divergence of `SoftTarget` at a temperature that "
                    "does not change can be computed."
                )
            temperatures.update(objective.top_k_temperatures)
        return KeptSignals(self.dtype, layers, self.top_k, tuple(sorted(temperatures)) or (1.0,))


def _count_rows(trainer: L.Trainer) -> int | None:
    """Rows of an epoch over all processes, training and validation, as far as the data know."""
    rows = 0
    for loader in (trainer.train_dataloader, trainer.val_dataloaders):
        size = getattr(getattr(loader, "dataset", None), "__len__", None)
        rows += size() if size is not None else 0
    return rows or None
