"""Accumulated batches that train as one batch: all batches of a step are known before the first of them is learned."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from torch import Tensor


class AccumulatingModule(L.LightningModule):
    """A LightningModule whose steps know all their batches.

    Lightning averages the means of accumulated batches, so an item of a batch with few would weigh more. What a batch's
    mean is worth depends on how many items the others have, those to come too. So with ``accumulate_grad_batches``
    above 1 the batches of a step are fetched and moved to the device before the first one is trained on, and none of
    the step after it. Those batches, not their activations, take the device's memory at one time. What a subclass adds
    to the loss is averaged over them, or weighed by :meth:`mean_over_step`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._window = _Window()

    def mean_over_step(self, name: str, mean: Tensor, batch: Any, count: Callable[[Any], Tensor]) -> Tensor:
        """Weigh a batch's mean so that a step has the mean over all items of its batches, on all processes.

        For a loss of one's own in ``training_step``. A mean over rows needs it only where batches differ in rows.

        Args:
            name: A name that no other such loss has.
            mean: The mean over the items of the batch, a scalar.
            batch: The batch.
            count: Gives the number of items of any batch of the step, a scalar tensor.

        Returns:
            A scalar.
        """
        counts = self._counts_in_step(name, count)
        if counts is None:
            counts = self._mean_over_ranks(count(batch).float()[None])
        return mean * _share(count(batch).float(), counts)

    def weighed_in_step(self, name: str, means: dict[str, Tensor], count: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Weigh the means of the batch under way, taken over all processes, as :meth:`mean_over_step` does one.

        Args:
            name: A name that no other such losses have.
            means: Scalars by name.
            count: Gives the number of items of any batch of the step, shape ``[means]``.

        Returns:
            Scalars by name.
        """
        counts = self._counts_in_step(name, count)
        if counts is None:
            return means
        shares = _share(counts[self._window.place], counts)
        return {name: mean * share for (name, mean), share in zip(means.items(), shares, strict=True)}

    def _counts_in_step(self, name: str, count: Callable[[Any], Tensor]) -> Tensor | None:
        window = self._window
        if window.batches and name not in window.counts:
            window.counts[name] = self._mean_over_ranks(torch.stack([count(batch).float() for batch in window.batches]))
        return window.counts.get(name)

    def _mean_over_ranks(self, counts: Tensor) -> Tensor:
        # DDP averages gradients over ranks, so the mean over all items needs the mean count as its denominator.
        if self._trainer is None or self.trainer.world_size == 1 or not self.trainer.training:
            return counts
        reduced: Tensor = self.trainer.strategy.reduce(counts, reduce_op="mean")
        return reduced

    # -- hooks -------------------------------------------------------------------------------------------------------

    # The loop calls these two on every batch, and no subclass overrides them, so they are where a step begins.

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        trainer: Any = self._trainer
        if trainer is None or not trainer.training or trainer.accumulate_grad_batches == 1:
            return super()._on_before_batch_transfer(batch, dataloader_idx)
        fetcher = trainer.fit_loop._data_fetcher
        if type(fetcher) not in (_PrefetchDataFetcher, _LookAhead) or not self.automatic_optimization:
            return super()._on_before_batch_transfer(batch, dataloader_idx)  # a step that fetches by itself
        window = self._window
        window.place += 1
        if window.place >= len(window.batches):
            # The loop holds on to its fetcher, which is why it is not replaced by another.
            fetcher.__class__ = _LookAhead
            fetcher.window = window
            window.close()
            window.given = [self._move(one) for one in (batch, *fetcher.look_ahead(trainer))]
            window.batches = list(window.given)
        window.is_moved = True
        return window.given[window.place]

    def _apply_batch_transfer_handler(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        if self._window.is_moved:
            self._window.is_moved = False
            return batch
        return super()._apply_batch_transfer_handler(batch, device, dataloader_idx)

    def _move(self, batch: Any) -> Any:
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = super()._on_before_batch_transfer(batch, dataloader_idx=0)
        return super()._apply_batch_transfer_handler(batch, self.trainer.strategy.root_device, dataloader_idx=0)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Average over the batches that a step has, where Lightning divides by those that a whole window has."""
        if self._window.batches:
            loss = loss * (self.trainer.accumulate_grad_batches / len(self._window.batches))
        super().backward(loss, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a run that was cut within a step go on at the next batch, though later ones have been fetched."""
        loop: Any = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        if "combined_loader" in loop and self._window.loader_states:
            loop["combined_loader"] = self._window.loader_states[self._window.place]

    def teardown(self, stage: str) -> None:
        """Let go of the batches."""
        self._window.close()


class _Window:
    """The batches of one optimizer step."""

    def __init__(self) -> None:
        self.close()

    def close(self) -> None:
        self.given: list[Any] = []  # what the loop gives to the steps, on the device
        self.batches: list[Any] = []  # what the steps train on, if that is not the same; none where each is a step
        self.place = 0  # of the batch under way
        self.is_moved = False  # whether the batch on its way to the step has been through the transfer hooks
        self.counts: dict[str, Tensor] = {}
        self.loader_states: list[Any] = []  # of stateful loaders, after each of the batches


class _LookAhead(_PrefetchDataFetcher):
    """A fetcher that can be asked for the rest of a step before its time."""

    window: _Window
    _waiting: list[Any]
    _ended: bool

    def look_ahead(self, trainer: Any) -> list[Any]:
        """Fetch the batches that follow the one just fetched, up to the end of its step, and give them out later."""
        loop = trainer.fit_loop
        states = [loop._combined_loader._state_dicts()]
        # Counted as the loop counts, which ends a window that a resume begins in its middle.
        ready, size = loop.epoch_loop.batch_progress.current.ready, trainer.accumulate_grad_batches
        last = min(ready - ready % size + size, trainer.num_training_batches)
        self._waiting = []
        while not self.done and ready + 1 + len(self._waiting) < last:
            try:
                self._waiting.append(super().__next__())
            except StopIteration:
                break
            states.append(loop._combined_loader._state_dicts())
        self._ended, self.done = self.done, self.done and not self._waiting
        self.window.loader_states = states
        return [batch for batch, *_ in self._waiting]

    def __next__(self) -> Any:
        if not self._waiting:
            return super().__next__()
        item = self._waiting.pop(0)
        self.done = self._ended and not self._waiting
        return item

    def reset(self) -> None:
        super().reset()
        self._waiting = []
        self.window.close()


def _share(count: Tensor, counts: Tensor) -> Tensor:
    return count / counts.mean(0).clamp(min=torch.finfo(counts.dtype).tiny)
