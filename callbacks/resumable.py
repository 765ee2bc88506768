"""Resumable: a run that is cut anywhere goes on as if it had not been."""

import logging
import random
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_distill.arguments import integer, typed
from lightning_distill.training.stops import SIGNALS, Stopped, end_children, remember, stopped_by

_LOG = logging.getLogger("lightning.pytorch.utilities.rank_zero")  # of rank_zero_info
_METRICS = "last_metrics"  # key of the checkpoint


@typed
class Resumable(L.Callback):
    """Makes a resumed run equal, bit for bit, the run without a break, and stops politely where it is asked to.

    - Every batch re-seeds torch, NumPy and ``random`` from (seed, rank, step, batch), so dropout after a break is what
      it would have been. (Tensor-parallel ranks then drop differently; leave this callback out there.)
    - The loader goes on at its next batch, where Lightning begins the epoch anew if a schedule asks for its length.
    - A checkpoint taken at the last batch before a validation resumes *with* that validation, where Lightning leaves it
      out, and a ``ReduceLROnPlateau`` gets its step of the epoch that was cut, where Lightning leaves that out.
    - SIGTERM lets the running step end, writes ``interrupted.ckpt`` beside the checkpoints and exits with code 143;
      Ctrl-C does the same with 130, and says how to go on. All processes stop after the same step. During a validation
      both wait for its end and one more step; a second Ctrl-C stops at once, without saving, with 130 too. Where
      processes were forked, the one that forked them tells them, waits, and ends with the same code.

    The order of the batches is the loader's part: give training a
    :class:`~lightning_distill.data.ResumableDataLoader`, or another one with ``state_dict`` and ``load_state_dict``.
    Resume with ``trainer.fit(..., ckpt_path=newest_checkpoint(folder))``.

    Exact are weights, optimizer, schedule, callbacks and what is logged by step or by validation. Means over a
    training epoch (``self.log(..., on_epoch=True)`` in ``training_step``) begin anew at the break, as Lightning does
    not store them; so do gradients of an accumulation window (checkpoints fall between windows).

    Args:
        seed: Seed of every step, from 0 to 2**32 - 1.
        resume_hint: What Ctrl-C says about going on; None for the call of ``trainer.fit``.

    Raises:
        TypeError: If the seed is no whole number.
        ValueError: If it is out of range.

    Example:
        >>> from lightning_distill.callbacks import Resumable
        >>> Resumable(seed=1).state_dict()
        {}
    """

    def __init__(self, seed: int = 0, *, resume_hint: str | None = None) -> None:
        super().__init__()
        integer("seed", seed, 0, 2**32 - 1)
        self.seed, self.resume_hint = seed, resume_hint
        self._received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._of_program: Any = None
        self._metrics: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Go to the end of the callbacks: what is saved when a signal came holds what all others did in the step."""
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self] + [self]  # type: ignore[attr-defined]
        remember(getattr(trainer.strategy.launcher, "procs", []))
        self._of_program = signal.getsignal(signal.SIGTERM)  # Lightning sets its own after this

    # -- the same random numbers -------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the step."""
        self._seed(trainer, within_step=True)

    def _seed(self, trainer: L.Trainer, *, within_step: bool) -> None:
        # Between two steps too: callbacks, transforms in the main process and validation draw there. The number of the
        # batch, not of the step, so that the batches of an accumulation window differ.
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        place = (self.seed, trainer.global_rank, batches, int(within_step))
        seeds = np.random.SeedSequence(place).generate_state(3)
        torch.manual_seed(int(seeds[0]))
        np.random.seed(seeds[1])  # noqa: NPY002 - users' transforms draw from the global generator
        random.seed(int(seeds[2]))

    # -- the same validations ----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint of the last batch before a validation resume before it, not behind it."""
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if loops is None or trainer.state.fn != "fit":
            return
        checkpoint[_METRICS] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        progress = loops["epoch_loop.batch_progress"]
        in_batch = progress["current"]["completed"] == progress["current"]["processed"] - 1
        if not in_batch or not _validation_is_due(trainer):
            return
        # What Lightning's own state would be after the first batch of that validation, which it would then repeat.
        for count in ("current", "total"):
            progress[count]["completed"] = progress[count]["processed"]
        none = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
        begun = {**none, "ready": 1, "started": 1}
        loops["epoch_loop.val_loop.batch_progress"].update(current=none, total=begun, is_last_batch=False)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the checkpoint's metrics until training starts."""
        self._metrics = checkpoint.get(_METRICS, {})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed what comes after, whether or not the validation drew numbers."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._seed(trainer, within_step=False)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the program's own handler of SIGTERM in the place of Lightning's, where it has one.

        Lightning's makes a collective call in the handler, which waits for ever if another process is in another.
        """
        earlier = self._of_program
        if callable(earlier) and not self._handlers and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, earlier)

    on_sanity_check_start = on_test_start = on_predict_start = on_validation_start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give a resumed run its metrics, and take over the two signals."""
        # A schedule that asks the Trainer how long it is (``estimated_stepping_batches``) makes Lightning build the
        # loaders before it has read their state, which it then never loads: the epoch would begin anew.
        loop = trainer.fit_loop
        if loop._combined_loader_states_to_load and loop._data_fetcher is not None:
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)
        # Lightning leaves out a plateau's schedule after a resume, because the metrics are gone. Here they are.
        restored = {name: torch.tensor(value, device=pl_module.device) for name, value in self._metrics.items()}
        trainer.callback_metrics.update(restored)
        loop._restarting = False
        self._seed(trainer, within_step=False)
        # In the place of Lightning's own, which exits with 0 and answers a signal by a collective call inside of the
        # handler. Only the main thread may do this; elsewhere (a notebook's worker) signals stay as they were.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}

    # -- the end, where it is asked for ------------------------------------------------------------------------------

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._received is not None:
                self._release()
                raise Stopped(number)
            rank_zero_info("\nCtrl-C: saving at the end of this step; once more stops at once, without saving.")
        self._received = self._received or signal.Signals(number)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, if a signal came to any of the processes."""
        # Within an accumulation window the gradients so far would be lost, so it ends first. After the last batch of an
        # epoch without a validation, Lightning would leave out the end of the epoch: it ends first, too.
        ends_epoch = trainer.is_last_batch and not _validation_is_due(trainer)
        if not trainer.fit_loop._should_accumulate() and not ends_epoch:
            self._leave_if_asked(trainer)
        self._seed(trainer, within_step=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save and leave, if the signal came during the last validation; give the signals back."""
        self._leave_if_asked(trainer)
        self._release()  # not in teardown: by then Lightning has put its own back

    def _leave_if_asked(self, trainer: L.Trainer) -> None:
        received = self._received is not None
        if trainer.world_size > 1:
            received = trainer.strategy.reduce_boolean_decision(received, all=False)
        if not received:
            return
        number = self._received or signal.SIGTERM
        found: Any = trainer.checkpoint_callback
        folder = found.dirpath if isinstance(found, ModelCheckpoint) and found.dirpath else trainer.default_root_dir
        path = Path(folder) / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        hint = self.resume_hint or f"trainer.fit(..., ckpt_path={str(path)!r})"
        what = "Ctrl-C" if number == signal.SIGINT else number.name
        rank_zero_info(f"\nStopped by {what} after step {trainer.global_step}, saved to {path}. Go on with: {hint}")
        raise Stopped(number, said=_LOG.isEnabledFor(logging.INFO))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back; where this process started others, end with them."""
        self._release()
        number = stopped_by(exception)
        if number is None:
            return
        end_children()
        # In the place of Lightning's exit code 1 for Ctrl-C, and of a traceback of what a child ended with.
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) and not isinstance(exception, SystemExit):
            raise Stopped(number) from None

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers, self._received = {}, None


def _validation_is_due(trainer: L.Trainer) -> bool:
    loop = trainer.fit_loop
    return bool(loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
