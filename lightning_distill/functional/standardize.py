"""Logits as z-scores, so that a student has to match their order and proportions and not their size."""

import torch
from torch import Tensor

# Below it, logits are all the same: they have no z-score, and no gradient.
_NO_DEVIATION = 1e-7


def standardize(logits: Tensor) -> Tensor:
    r"""Logits minus their mean, in units of their standard deviation: :math:`(z_c - \bar z) / \sigma(z)`.

    Both are over the classes; the deviation is that of a sample, with :math:`C - 1` below the sum. Logits that are all
    the same give 0.

    Args:
        logits: Shape ``[..., C]``, of at least 3 classes, float32 or float64, finite.

    Returns:
        Shape ``[..., C]``.

    Raises:
        ValueError: If there are fewer classes.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> functional.standardize(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])).tolist()
        [[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]]

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", 2024.
    """
    return (logits - logits.mean(-1, keepdim=True)) / deviation(logits)


def deviation(logits: Tensor) -> Tensor:
    """Standard deviation ``[..., 1]`` over the classes; infinite where all logits are the same.

    Raises:
        ValueError: If there are fewer than 3 classes.
    """
    if logits.shape[-1] < 3:
        raise ValueError(
            f"Expected argument `standardize` to be False for fewer than 3 classes, but got True for "
            f"{logits.shape[-1]}: whatever two logits are, their z-scores are 0.71 and -0.71."
        )
    deviations = logits - logits.mean(-1, keepdim=True)
    found = deviations.norm(dim=-1, keepdim=True) / (logits.shape[-1] - 1) ** 0.5
    return found.masked_fill(found < _NO_DEVIATION, torch.inf)
