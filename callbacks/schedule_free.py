"""ScheduleFree: the right weights at the right time with a schedule-free optimizer."""

from typing import Any

import lightning as L


class ScheduleFree(L.Callback):
    """Switches schedule-free optimizers between the weights they train and the average they evaluate.

    Such an optimizer (``build_optimizer(module, "schedule_free_adamw", ...)``) trains at one point and is good at
    another, a running average. This callback has the average in the module for validation, in every checkpoint, and
    after the fit, and goes back before the next batch. Checkpoints of weights only hold the average if they are taken
    at validation. Batch norm keeps statistics of the training point: recompute them.

    Raises:
        ValueError: If no optimizer can be switched.

    Example:
        >>> from lightning_distill.callbacks import ScheduleFree
        >>> ScheduleFree().state_dict()
        {}

    Source: Defazio et al., "The Road Less Scheduled", 2024.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run in which there is nothing to switch."""
        if not _switchable(trainer):
            raise ValueError(
                "Expected argument `optimizer` to be schedule-free beside the ScheduleFree callback, but got "
                f"{[type(optimizer).__name__ for optimizer in trainer.optimizers]}; leave the callback out."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Back to the weights that are trained."""
        for optimizer in _switchable(trainer):
            optimizer.train()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """To the average."""
        self._average(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """To the average: its weights are the module's own tensors, the optimizers' state is taken anew."""
        self._average(trainer)
        checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(o) for o in trainer.optimizers]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """To the average."""
        self._average(trainer)

    def _average(self, trainer: L.Trainer) -> None:
        for optimizer in _switchable(trainer):
            optimizer.eval()


def _switchable(trainer: L.Trainer) -> list[Any]:
    return [optimizer for optimizer in trainer.optimizers if callable(getattr(optimizer, "eval", None))]
