"""LossAdvice: what the training loss says about the learning rate, after the fit."""

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_distill.arguments import between, typed

Verdict = Literal["too short", "diverging", "flat", "falling"]


@typed
class LossAdvice(L.Callback):
    """Looks at the training loss after the fit and advises on the learning rate. It changes nothing.

    The losses of every ``window`` steps are averaged. ``diverging`` (not finite, or the last window more than 20 %
    above the lowest): lower the learning rate by 10. ``flat`` (the last window less than ``min_fall`` below the first):
    raise it by 5. Both factors are rules of thumb for the next try, not measurements.

    Args:
        window: Steps that are averaged.
        min_fall: Relative fall from the first window to the last below which the curve counts as flat.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> from lightning_distill.callbacks import LossAdvice
        >>> LossAdvice.judge(torch.tensor([2.0, 1.999, 1.998]))
        'flat'
    """

    def __init__(self, window: int = 50, min_fall: float = 0.01) -> None:
        super().__init__()
        between("window", window, 0)
        between("min_fall", min_fall, 0, 1)
        self.window, self.min_fall = window, min_fall
        self.verdict: Verdict | None = None
        self._windows: list[Tensor] = []
        self._sum: Tensor | float = 0.0
        self._steps = 0

    @staticmethod
    def judge(losses: Tensor, min_fall: float = 0.01) -> Verdict:
        """Name the shape of averaged losses in the order of training, shape [windows]; ``min_fall`` as of the class."""
        if not losses.isfinite().all():
            return "diverging"
        if len(losses) < 3:
            return "too short"
        first, last, lowest = losses[0], losses[-1], losses.min()
        scale = losses.abs().max()
        if last - lowest > 0.2 * lowest.abs() and last - lowest > min_fall * scale:
            return "diverging"
        return "flat" if first - last < min_fall * first.abs() else "falling"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a loss, the mean over ranks, to its window on its device."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        self._sum = self._sum + trainer.strategy.reduce(loss.detach().float().clone(), reduce_op="mean")
        self._steps += 1
        if self._steps == self.window:
            self._windows.append(self._sum / self.window)
            self._sum, self._steps = 0.0, 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge the curve and say it."""
        self.verdict = self.judge(torch.tensor([float(loss) for loss in self._windows]), self.min_fall)
        if self.verdict == "diverging":
            rank_zero_warn("The training loss diverged: try a learning rate lower by a factor of 10.")
        elif self.verdict == "flat":
            rank_zero_warn("The training loss hardly fell: try a learning rate higher by a factor of 5.")
        else:
            rank_zero_info(f"Training loss: {self.verdict}.")

    def state_dict(self) -> dict[str, Any]:
        """The windows so far."""
        return {"windows": [float(loss) for loss in self._windows], "sum": float(self._sum), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the windows of a checkpoint."""
        self._windows = [torch.tensor(loss) for loss in state_dict["windows"]]
        self._sum, self._steps = state_dict["sum"], state_dict["steps"]
