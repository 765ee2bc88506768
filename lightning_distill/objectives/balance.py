"""Balance between objectives that is found during training."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_distill.arguments import typed


@typed
class UncertaintyBalance(nn.Module):
    r"""Weights learned from the uncertainty of each objective.

    The total is :math:`\sum_i e^{-s_i} L_i + s_i / 2` with a learned log-variance :math:`s_i` per objective, 0 at the
    start, where the total is the plain sum. The log-variances are parameters, so they are in checkpoints; give them to
    the optimizer. The losses should be positive: one that falls below 0 drives its weight up without a bound.

    Args:
        names: Names of the objectives.

    Raises:
        ValueError: If there are no names or one comes twice.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import UncertaintyBalance
        >>> balance = UncertaintyBalance(["soft_target", "hard_label"])
        >>> balance({"soft_target": torch.tensor(2.0), "hard_label": torch.tensor(1.0)}).item()
        3.0

    Source: Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", 2018 (the form for
    classification).
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = _checked(names)
        self.log_variance = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        """The total, a scalar, of one scalar per name."""
        ordered = _ordered(losses, self.names)
        return ((-self.log_variance).exp() * ordered + self.log_variance / 2).sum()


@typed
class GradientNormBalance(nn.Module):
    r"""Weights under which every objective pulls equally hard.

    Each objective's weight is the mean of all gradient norms over its own, with norms measured at tensors that all
    objectives reach and smoothed over steps. An objective whose gradient is 0 has weight 1. The smoothed norms are
    buffers, so they are in checkpoints. Measuring costs one more backward pass, down to those tensors, per objective.

    Args:
        names: Names of the objectives.
        decay: Share of the smoothed norm that is kept at each step, in [0, 1).

    Raises:
        ValueError: If there are no names, one comes twice, or the decay is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import GradientNormBalance
        >>> balance = GradientNormBalance(["a", "b"])
        >>> x = torch.ones(2, requires_grad=True)
        >>> balance({"a": x.sum(), "b": 3 * x.sum()}, [x]).item()
        8.0
        >>> balance.weights()["a"].item()
        2.0

    Source: Chen et al., "GradNorm", 2018, with its asymmetry at 0, in which case the weights need no optimizer.
    """

    norms: Tensor

    def __init__(self, names: Sequence[str], *, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"Expected argument `decay` to be in [0, 1), but got {decay}.")
        self.names, self.decay = _checked(names), decay
        self.register_buffer("norms", torch.full((len(self.names),), torch.nan))

    def forward(self, losses: dict[str, Tensor], shared: Sequence[Tensor]) -> Tensor:
        """The total, a scalar, of one scalar per name; while gradients are on, the norms are measured first.

        Args:
            losses: One scalar per name.
            shared: Tensors, such as the parameters of the student's last layer, that the losses depend on.
        """
        ordered = _ordered(losses, self.names)
        if torch.is_grad_enabled():
            self._measure([losses[name] for name in self.names], list(shared))
        weights = self.weights()
        return (torch.stack([weights[name] for name in self.names]) * ordered).sum()

    def weights(self) -> dict[str, Tensor]:
        """The current weight of each objective."""
        pulling = self.norms > 0
        mean = self.norms[pulling].mean()
        found = torch.where(pulling, mean / self.norms, 1.0)
        return dict(zip(self.names, found, strict=True))

    @torch.no_grad()
    def _measure(self, losses: list[Tensor], shared: list[Tensor]) -> None:
        norms = []
        for loss in losses:
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
            found = [gradient for gradient in gradients if gradient is not None]
            norms.append(torch.nn.utils.get_total_norm(found) if found else torch.zeros_like(loss))
        measured = torch.stack(norms).to(self.norms)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(measured)
        # Ratios alone matter, so a sum over ranks is as good as their mean.
        self.norms.copy_(torch.where(self.norms.isnan(), measured, self.norms.lerp(measured, 1 - self.decay)))


def _checked(names: Sequence[str]) -> list[str]:
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"Expected argument `names` to be a list of names, each once, but got {names!r}.")
    return list(names)


def _ordered(losses: dict[str, Tensor], names: list[str]) -> Tensor:
    if set(losses) != set(names):
        raise ValueError(f"Expected argument `losses` to have the names {names}, but got {list(losses)}.")
    return torch.stack([losses[name] for name in names])
