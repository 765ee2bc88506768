"""Read a learning rate off the curve of a learning-rate range test."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf, isfinite
from typing import Literal

import torch
from torch import Tensor

Suggestion = Literal["valley", "steepest", "slide", "minimum"]


def smooth_losses(losses: Sequence[float] | Tensor, smoothing: float = 0.98) -> Tensor:
    r"""Exponential moving average with the bias of its zero start taken out.

    With :math:`\beta` the smoothing, :math:`m_i = \beta m_{i-1} + (1 - \beta) l_i` and :math:`m_0 = 0`, the value at
    the i-th loss (counted from 1) is :math:`m_i / (1 - \beta^i)`: a weighted mean of the losses so far.

    Args:
        losses: losses in the order they were seen, shape ``[N]``.
        smoothing: weight of the past in ``[0, 1)``; 0 returns the losses as they are. fastai uses 0.98.

    Returns:
        Smoothed losses, float64, shape ``[N]``.

    Raises:
        ValueError: ``smoothing`` is outside ``[0, 1)``.

    Example:
        >>> smooth_losses([4.0, 2.0, 2.0], smoothing=0.5)
        tensor([4.0000, 2.6667, 2.2857], dtype=torch.float64)
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"Expected argument `smoothing` to be in [0, 1), but got {smoothing}")
    values = torch.as_tensor(losses, dtype=torch.float64).tolist()
    _, *averages = accumulate(values, lambda mean, loss: smoothing * mean + (1 - smoothing) * loss, initial=0.0)
    count = torch.arange(1, len(values) + 1, dtype=torch.float64)
    return torch.tensor(averages, dtype=torch.float64) / (1 - smoothing**count)


def _valley(lrs: Tensor, losses: Tensor) -> float:
    # Longest strictly decreasing subsequence: length[i] is the longest one ending at i.
    length, values = list[int](), losses.tolist()
    for i, value in enumerate(values):
        length.append(1 + max((length[j] for j in range(i) if values[j] > value), default=0))
    longest = max(length)
    end = length.index(longest)
    # One half of the way, rounded as fastai rounds it: a third, and half a third, each cut to whole steps.
    return lrs[end - longest + int(longest / 3) + int(longest / 6)].item()


def _slide(lrs: Tensor, losses: Tensor) -> float:
    interval, threshold = 15, 0.005
    gradient = torch.gradient(losses)[0]
    # A window slides from the right end to the left until the gradients at its two ends agree.
    right = len(losses) - 1
    chosen = lrs[right - interval]
    while right >= interval and (gradient[right] - gradient[right - interval]).abs() > threshold:
        chosen = lrs[right - interval]
        right -= 1
    return chosen.item()


_RULES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "valley": _valley,
    "steepest": lambda lrs, losses: lrs[(losses.diff() / lrs.log().diff()).argmin()].item(),
    "slide": _slide,
    "minimum": lambda lrs, losses: lrs[losses.argmin()].item() / 10,
}
_FALL = 4.0  # standard errors
_FEWEST_POINTS = 16  # the interval of "slide" and one point more


def lr_suggestion(
    lrs: Sequence[float] | Tensor, losses: Sequence[float] | Tensor, rule: Suggestion = "valley"
) -> float:
    """Suggest a learning rate from the curve of a range test, by one of fastai's four rules.

    - ``"valley"``: the middle of the longest (strictly decreasing) valley of the curve.
    - ``"steepest"``: where the loss falls fastest per unit of log learning rate.
    - ``"slide"``: left end of a window of 15 points that slides from the right until the gradients at its ends agree.
    - ``"minimum"``: a tenth of the learning rate where the loss is lowest.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks (2017), for the range test; the documentation of
    fastai's ``Learner.lr_find`` for the rules.

    Args:
        lrs: learning rates in rising order, shape ``[N]`` with N at least 16.
        losses: smoothed losses, shape ``[N]``, without the noisy head and the exploding tail, see :func:`trim_curve`.
        rule: name of the rule.

    Raises:
        ValueError: unknown ``rule``, different lengths, fewer than 16 points, or a loss that is not finite.

    Example:
        >>> lrs = torch.logspace(-6, 0, 61)
        >>> losses = 1 - torch.sigmoid(4 * (lrs.log10() + 3)) + 4 * lrs
        >>> {rule: round(lr_suggestion(lrs, losses, rule), 6) for rule in ("valley", "steepest", "slide", "minimum")}
        {'valley': 6.3e-05, 'steepest': 0.000794, 'slide': 0.0002, 'minimum': 0.001}
    """
    if rule not in _RULES:
        raise ValueError(f"Expected argument `rule` to be one of {', '.join(_RULES)}, but got {rule!r}")
    lrs, losses = (torch.as_tensor(values, dtype=torch.float64) for values in (lrs, losses))
    if len(lrs) != len(losses) or len(losses) < _FEWEST_POINTS:
        raise ValueError(
            f"Expected arguments `lrs` and `losses` to have one length of at least {_FEWEST_POINTS} points, but got "
            f"{len(lrs)} and {len(losses)}; take more steps, or lower the first learning rate"
        )
    if not losses.isfinite().all():
        raise ValueError("Expected argument `losses` to be finite, but got NaN or infinity; cut the curve before it")
    return _RULES[rule](lrs, losses)


def trim_curve(
    lrs: Sequence[float], losses: Sequence[float], smoothing: float = 0.98, skip_start: int = 10, skip_end: int = 5
) -> tuple[Tensor, Tensor]:
    """Smooth a recorded curve and keep the part that suggestions are read from.

    The curve is cut at its first loss that is not finite, smoothed, and loses ``skip_start`` points of head (the
    average is still noisy there) and ``skip_end`` of tail (the explosion). A curve without a fall is an error, since
    every rule would return a number for it all the same: see :func:`height_of_fall`.

    Args:
        lrs: learning rates in rising order, length ``N``.
        losses: losses as recorded, length ``N``.
        smoothing: see :func:`smooth_losses`.
        skip_start: points to drop at the start, at least 1.
        skip_end: points to drop at the end.

    Returns:
        Learning rates and smoothed losses, float64, of one length.

    Raises:
        ValueError: the loss is not finite from the start, too few points are left, or the curve never falls.

    Example:
        >>> kept, smoothed = trim_curve([10**-k for k in range(50, 0, -1)], [1 / k for k in range(1, 51)])
        >>> kept.shape, smoothed.shape
        (torch.Size([35]), torch.Size([35]))
    """
    finite = next((i for i, loss in enumerate(losses) if not isfinite(loss)), len(losses))
    if finite < min(len(losses), skip_start):
        raise ValueError(
            f"Expected a finite loss at the start of the sweep, but step {finite + 1} gave "
            f"{losses[finite]}; look for NaN in the data or the weights, or start lower"
        )
    smoothed = smooth_losses(losses[:finite], smoothing)
    stop = finite - skip_end
    kept_lrs, kept = torch.tensor(lrs[:finite], dtype=torch.float64)[skip_start:stop], smoothed[skip_start:stop]
    if len(kept) < _FEWEST_POINTS:
        raise ValueError(
            f"Expected at least {_FEWEST_POINTS} points of the curve to read from, but got {len(kept)} of {len(losses)}"
            " recorded before the loss diverged; take more steps or start lower"
        )
    if height_of_fall(losses[:finite], skip_start) <= _FALL:
        start, lowest = sum(losses[:skip_start]) / skip_start, kept.min().item()
        raise ValueError(
            f"Expected the loss to fall somewhere in the sweep, but it starts at {start:.4g}, and that its lowest "
            f"smoothed value is {lowest:.4g} may be noise; check that parameters get gradients, widen the range, or "
            "take more steps or larger batches"
        )
    return kept_lrs, kept


def height_of_fall(losses: Sequence[float] | Tensor, skip_start: int = 10) -> float:
    r"""How far a curve falls anywhere, in standard errors of its noise; above 4 is a fall.

    For every window of a tenth and of a fifth of the points: the mean of all losses before it minus its own mean, over
    :math:`s \sqrt{1/n + 1/w}`. The noise :math:`s` up to the end of the window is that of the steps from one loss to
    the next, :math:`s^2 = \overline{(l_{i+1} - l_i)^2} / 2`, which a slow fall does not enter. The largest counts.

    Of curves of pure noise 0.5 % (of 100 points) to 1.6 % (of 32) get above 4. The losses are read as they were
    recorded: a smoothed curve has lost most of its fall by the time it is as smooth as fastai's.

    Args:
        losses: losses in the order they were seen, shape ``[N]``.
        skip_start: points before the first window, at least 1.

    Returns:
        Standard errors; minus infinity if there are too few points.

    Example:
        >>> noise = torch.randn(60, generator=torch.Generator().manual_seed(0))
        >>> height_of_fall(noise) > 4, height_of_fall(noise - torch.arange(60) / 20) > 4
        (False, True)
    """
    values = torch.as_tensor(losses, dtype=torch.float64)
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    rough = torch.cat([values.new_zeros(1), values.diff().square().cumsum(0)])
    highest = -inf
    for window in (max(5, len(values) // 10), max(6, len(values) // 5)):
        before = torch.arange(skip_start, len(values) - window + 1)
        if not len(before):
            continue
        head, low = total[before] / before, (total[before + window] - total[before]) / window
        noise = (rough[before + window - 1] / (2 * (before + window - 1))).sqrt()
        # What rounding makes of a flat curve is no fall either.
        error = noise * (1 / before + 1 / window).sqrt() + 1e-6 * head.abs() + 1e-30
        highest = max(highest, ((head - low) / error).max().item())
    return highest
