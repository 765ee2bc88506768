"""Metrics that torchmetrics does not have in this form."""

import warnings

import torch
from torch import Tensor
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef


class Spearman(SpearmanCorrCoef):
    """Spearman's correlation of numbers ``[N]``, which keeps them all, as ranks need; without saying so each time.

    Example:
        >>> import torch
        >>> from lightning_distill.tasks.metrics import Spearman
        >>> round(Spearman()(torch.tensor([0.1, 0.5, 0.4]), torch.tensor([1.0, 3.0, 2.0])).item(), 4)
        1.0
    """

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `Spearman.* will save all targets and predictions")
            super().__init__()


class Pearson(PearsonCorrCoef):
    """Pearson's correlation; of several outputs the mean of theirs, however many the first batch has.

    Example:
        >>> import torch
        >>> from lightning_distill.tasks.metrics import Pearson
        >>> pearson, x = Pearson(), torch.tensor([[1.0, 1.0], [2.0, 3.0], [3.0, 2.0]])
        >>> pearson.update(x, x.flip(1))
        >>> round(pearson.compute().item(), 4)
        0.5
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predictions and targets ``[B]`` or ``[B, outputs]``."""
        outputs = preds.shape[1] if preds.ndim > 1 else 1
        if outputs != self.num_outputs and not self.n_total.any():
            self.num_outputs = outputs
            for name, reduction in list(self._reductions.items()):
                self.add_state(name, torch.zeros(outputs, device=self.device), reduction, self._persistent[name])
        super().update(preds, target)

    def compute(self) -> Tensor:
        """The mean over outputs."""
        return super().compute().mean()
