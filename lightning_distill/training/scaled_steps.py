"""Steps under a GradScaler: their true gradient norm, and schedules that wait with them."""

from typing import Any

import lightning as L
from torch.optim import Optimizer

from lightning_distill.functional.clipping import gradient_of, group_tensors, total_norm


class ScaledSteps(L.LightningModule):
    """A LightningModule that logs the norm of its gradients unscaled, and whose schedules follow the steps taken."""

    _scale: float | None = None  # of the GradScaler, before the optimizer's step

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of the gradient on the steps that are logged, unless a callback that looks at it does."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        seen = any(getattr(callback, "checks_gradients", False) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        if not seen and every and (self.global_step + 1) % every == 0:
            gradients = [gradient for p in self.parameters() if (gradient := gradient_of(p)) is not None]
            norm = total_norm(group_tensors(gradients))
            # A fused optimizer unscales in its step, which is to come.
            fused = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
            self.log("grad_norm", norm / scaler.get_scale() if fused else norm)
        self._scale = None if scaler is None else scaler.get_scale()

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step the schedule, unless it follows the steps and the GradScaler has left this one out."""
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        config = next(config for config in self.trainer.lr_scheduler_configs if config.scheduler is scheduler)
        follows = config.interval == "step" and config.frequency == 1
        # It lowers its scale then, and only then.
        if follows and self._scale is not None and scaler.get_scale() < self._scale:
            return
        super().lr_scheduler_step(scheduler, metric)
