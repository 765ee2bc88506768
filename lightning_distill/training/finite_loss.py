"""FiniteLoss: no update from a loss or a gradient that is NaN or infinite."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.arguments import integer, typed
from lightning_distill.functional.clipping import all_finite, group_tensors


@typed
class FiniteLoss(L.Callback):
    """Stops before the update on a NaN or infinite loss or gradient, or leaves that step out.

    The error names the step, the batch, and what was logged that is not finite: with
    :class:`~lightning_distill.DistillationModule` the objective. That module has ``FiniteLoss()`` on unless it is given
    another one. A step is left out as a whole, with all batches of its accumulation window: weights and optimizer stay,
    the schedule goes on. Running statistics of batch norm have seen the batch all the same.

    A finite loss may have a gradient that is not (a square root at 0, infinity times 0), so gradients are looked at
    before each step, for less than the price of their norm. Beside
    :class:`~lightning_distill.callbacks.GradientClipping`, which looks by itself, they are left to its ``nonfinite``.
    Under a GradScaler infinite gradients are normal: it leaves the step out and lowers its scale, and only with a scale
    below 1 are they an error.

    All processes stop, or skip, together: each flag is the maximum over ranks, one number a batch and one a step. They
    are read on the host once the backward is queued, so that a device waits for the launch of the optimizer's step and
    no more.

    Args:
        max_skipped: How many steps may be left out in the whole training before the next one is an error.

    Attributes:
        skipped: How many were.

    Raises:
        TypeError: If ``max_skipped`` is no whole number.
        ValueError: If it is below 0.
        RuntimeError: On a loss or a gradient that is not finite, with ``max_skipped`` used up.

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
            if not self._leave_out:
                advice = "Look at that batch, lower the learning rate"
                self._count(f"a finite loss, but got {self._describe(trainer)}", advice)
            self._leave_out = True
        if self._leave_out:
            self._clear(trainer, list(pl_module.parameters()))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Stop, or leave the step out, if a gradient is not finite though every loss was; the window is over."""
        left_out, self._leave_out = self._leave_out, False
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        clips = any(getattr(callback, "checks_gradients", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if left_out or clips or (scaler is not None and scaler.get_scale() >= 1):
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [_entries(parameter.grad) for parameter in parameters if parameter.grad is not None]
        broken = (~all_finite(group_tensors(gradients))).float().to(trainer.strategy.root_device)
        if bool(trainer.strategy.reduce(broken, reduce_op="max")):
            held = {id(p) for p in parameters if p.grad is not None and not _entries(p.grad).isfinite().all()}
            names = [name for name, parameter in pl_module.named_parameters() if id(parameter) in held]
            where = f"in {names[0]}" if names else "in another process"
            where += f" and {len(names) - 1} more parameters" if len(names) > 1 else ""
            advice = (
                "`Trainer(detect_anomaly=True)` names the operation (often a square root, a norm or a logarithm at 0)"
            )
            self._count(f"finite gradients, but got NaN or infinity {where} {self._place(trainer)}", advice)
            self._clear(trainer, parameters)

    def _count(self, what: str, advice: str) -> None:
        """Count a step that is left out; an error if it is one too many."""
        self.skipped += 1
        if self.skipped > self.max_skipped:
            how = f"max_skipped={self.max_skipped} is used up" if self.max_skipped else "nothing was updated"
            raise RuntimeError(
                f"Expected {what}; {how}. {advice}, or leave such steps out with "
                f"FiniteLoss(max_skipped={max(10, 2 * self.max_skipped)})."
            )
        rank_zero_warn(f"Step left out ({self.skipped} of {self.max_skipped}): {what.partition('but got ')[2]}.")

    def _clear(self, trainer: L.Trainer, parameters: list[Any]) -> None:
        # Without a gradient, an optimizer touches neither a parameter nor its state. A GradScaler wants to see one, and
        # leaves the step out by itself if it is not finite.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        for parameter in parameters:
            if parameter.grad is not None and scaled:
                _entries(parameter.grad).fill_(math.nan)
            elif parameter.grad is not None:
                parameter.grad = None

    def _describe(self, trainer: L.Trainer) -> str:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        names = [name for name, value in logged.items() if not math.isfinite(value) and name.startswith("train")]
        # The total is not finite because one of its parts is not: name the parts where there are any.
        parts = [name for name in names if name != "train_loss"] or names
        what = ", ".join(f"{name.removeprefix('train_')} = {logged[name]}" for name in parts)
        what = what or "NaN or infinity in another process or in a loss that is not logged"
        return f"{what} {self._place(trainer)}"

    def _place(self, trainer: L.Trainer) -> str:
        return f"at step {trainer.global_step}, batch {trainer.fit_loop.batch_idx} of epoch {trainer.current_epoch}"


def _entries(gradient: Tensor) -> Tensor:
    """The numbers of a gradient as a tensor of real ones, of which a sparse gradient stores a part."""
    values = gradient._values() if gradient.is_sparse else gradient
    return torch.view_as_real(values) if values.is_complex() else values
