"""FiniteLoss: no update from a loss that is NaN or infinite."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.arguments import integer, typed


@typed
class FiniteLoss(L.Callback):
    """Stops before the update on a NaN or infinite loss, or leaves that step out.

    The error names the step, the batch, and what was logged that is not finite: with
    :class:`~lightning_distill.DistillationModule` the objective. That module has ``FiniteLoss()`` on unless it is given
    another one. A step is left out as a whole, with all batches of its accumulation window: weights and optimizer stay,
    the schedule goes on. Running statistics of batch norm have seen the batch all the same.

    All processes stop, or skip, together: the flag is the maximum over ranks, one number a batch. It is read on the
    host once the backward is queued, so that a device waits for the launch of the optimizer's step and no more.

    Args:
        max_skipped: How many steps may be left out in the whole training before the next one is an error.

    Attributes:
        skipped: How many were.

    Raises:
        TypeError: If ``max_skipped`` is no whole number.
        ValueError: If it is below 0.
        RuntimeError: On a loss that is not finite, with ``max_skipped`` used up.

    Example:
        >>> from lightning_distill.callbacks import FiniteLoss
        >>> FiniteLoss(max_skipped=3).state_dict()
        {'skipped': 0}
    """

    def __init__(self, max_skipped: int = 0) -> None:
        super().__init__()
        integer("max_skipped", max_skipped, 0)
        self.max_skipped, self.skipped = max_skipped, 0
        self._broken: Tensor | None = None
        self._leave_out = False

    def state_dict(self) -> dict[str, Any]:
        """How many steps were left out."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = state_dict["skipped"]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Ask all processes, without waiting for the device."""
        broken = (~loss.detach().isfinite().all()).float()
        self._broken = trainer.strategy.reduce(broken, reduce_op="max")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop, or clear the gradients before anything else looks at them."""
        assert self._broken is not None
        if bool(self._broken):
            where = self._describe(trainer)
            if not self._leave_out:
                self.skipped += 1
            if self.skipped > self.max_skipped:
                how = f"max_skipped={self.max_skipped} is used up" if self.max_skipped else "nothing was updated"
                raise RuntimeError(
                    f"Expected a finite loss, but got {where}; {how}. Look at that batch, lower the learning rate, or "
                    f"leave such steps out with FiniteLoss(max_skipped={max(10, 2 * self.max_skipped)})."
                )
            rank_zero_warn(f"Step left out ({self.skipped} of {self.max_skipped}): {where}.")
            self._leave_out = True
        if self._leave_out:
            self._clear(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """The window is over."""
        self._leave_out = False

    def _clear(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Without a gradient, an optimizer touches neither a parameter nor its state. A GradScaler wants to see one, and
        # leaves the step out by itself if it is not finite.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad = torch.full_like(parameter.grad, math.nan) if scaled else None

    def _describe(self, trainer: L.Trainer) -> str:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        names = [name for name, value in logged.items() if not math.isfinite(value) and name.startswith("train")]
        # The total is not finite because one of its parts is not: name the parts where there are any.
        parts = [name for name in names if name != "train_loss"] or names
        what = ", ".join(f"{name.removeprefix('train_')} = {logged[name]}" for name in parts)
        place = f"at step {trainer.global_step}, batch {trainer.fit_loop.batch_idx} of epoch {trainer.current_epoch}"
        return f"{what or 'NaN or infinity in another process or in a loss that is not logged'} {place}"
