"""Metrics that torchmetrics does not have in this form."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelF1Score
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


class MacroF1(MultilabelF1Score):
    """The mean of the F1 scores of several labels, however many the first batch has.

    Args:
        **options: Those of :class:`torchmetrics.classification.MultilabelF1Score`, but for the number of labels.

    Example:
        >>> import torch
        >>> from lightning_distill.tasks.metrics import MacroF1
        >>> macro_f1 = MacroF1()
        >>> macro_f1(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[1, 0], [1, 1]])).item()
        0.8333333730697632
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(num_labels=2, **options)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add probabilities and labels ``[B, L]``."""
        if preds.shape[1] != self.num_labels and self.update_count <= 1:
            self.num_labels = preds.shape[1]
            # torchmetrics asks for two labels or more, and computes one as well.
            self.validate_args = self.num_labels > 1
            _resize(self, self.num_labels)
        super().update(preds, target)


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
            _resize(self, outputs)
        super().update(preds, target)

    def compute(self) -> Tensor:
        """The mean over outputs."""
        return super().compute().mean()


def _resize(metric: Metric, size: int) -> None:
    """Give the states of a metric that has seen nothing a size."""
    for name, reduction in list(metric._reductions.items()):
        state = torch.zeros(size, dtype=getattr(metric, name).dtype, device=metric.device)
        metric.add_state(name, state, reduction, metric._persistent[name])
