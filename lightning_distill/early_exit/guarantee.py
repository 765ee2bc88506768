"""What a calibration set can promise about rows nobody has seen, for any distribution and any number of rows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_MOST_ROWS = 10**8


def harm_p_value(harm: Tensor, max_drop: float) -> float:
    r"""Chance of so little harm on the calibration rows if the true harm were above what is allowed.

    A row's harm is 1 where the full model is right and the early answer wrong (a share, where a row has several
    answers). Accuracy falls by at most the mean harm, so a small p-value for :math:`H_0: \mathrm{E}[harm] > \alpha`
    says that accuracy falls by at most :math:`\alpha`. For harms of 0 and 1 this is the exact binomial test, whose
    inversion is the Clopper-Pearson bound; for shares it is the Hoeffding-Bentkus bound.

    Args:
        harm: Shape ``[N]``, between 0 and 1, of independent rows.
        max_drop: :math:`\alpha`, between 0 and 1.

    Example:
        >>> import torch
        >>> from lightning_distill.early_exit.guarantee import harm_p_value
        >>> round(harm_p_value(torch.zeros(598), 0.005), 4)
        0.0499

    Source: Clopper and Pearson, "The use of confidence or fiducial limits", 1934; Bates et al., "Distribution-Free,
    Risk-Controlling Prediction Sets", 2021 (Hoeffding-Bentkus).
    """
    rows, total = len(harm), float(harm.double().sum())
    if bool(((harm == 0) | (harm == 1)).all()):
        return _binomial_cdf(round(total), rows, max_drop)
    mean = min(total / rows, max_drop)
    hoeffding = math.exp(-rows * (_xlog(mean, max_drop) + _xlog(1 - mean, 1 - max_drop)))
    return min(1.0, hoeffding, math.e * _binomial_cdf(math.ceil(total), rows, max_drop))


def rows_needed(max_drop: float, confidence: float, harm_rate: float = 0.0) -> int | None:
    """Rows from which on, for every larger number too, a harm rate is small enough to promise a drop.

    None if no number up to a hundred million is enough.

    Example:
        >>> from lightning_distill.early_exit.guarantee import rows_needed
        >>> rows_needed(0.005, 0.95), rows_needed(0.01, 0.95, 0.002), rows_needed(0.01, 0.95, 0.02)
        (598, 628, None)
    """
    if harm_rate >= max_drop:
        return None

    def harmed(rows: int) -> int:
        return math.ceil(rows * harm_rate)

    def enough(rows: int) -> bool:
        return _binomial_cdf(harmed(rows), rows, max_drop) <= 1 - confidence

    def first_row(count: int) -> int:
        """The fewest rows of which so many are harmed."""
        rows = int((count - 1) / harm_rate)
        while harmed(rows) >= count:
            rows -= 1
        while harmed(rows) < count:
            rows += 1
        return rows

    # With the rows the chance falls, but it rises where one more of them is harmed: a tooth for every count. The last
    # tooth whose highest point, its first row, is too high is found by bisection, as these points fall, but for
    # rounding: a row more or less moves a tooth by as much as `slack` teeth do.
    low, high = 0, _MOST_ROWS
    if harm_rate > 0:
        slack = 10 + 3 * math.ceil(max_drop * harm_rate / (max_drop - harm_rate))
        last = harmed(_MOST_ROWS)
        tooth = _bisect(lambda count: enough(first_row(count)), 0, last)
        tooth = next((count for count in range(min(tooth + slack, last), 0, -1) if not enough(first_row(count))), 0)
        low, high = first_row(tooth), first_row(tooth + 1)
    found = _bisect(enough, low, high)
    return found if found < _MOST_ROWS else None


def _bisect(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first number above ``low``, which does not hold, that does; ``high`` is taken to hold."""
    step = 1
    while low + step < high and not holds(low + step):
        low, step = low + step, 2 * step  # a large number costs more to ask than a small one
    high = min(high, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _binomial_cdf(count: int, rows: int, rate: float) -> float:
    """P(Bin(rows, rate) <= count)."""
    if count >= rows:
        return 1.0
    k = torch.arange(count + 1, dtype=torch.float64)
    n = torch.tensor(rows, dtype=torch.float64)
    choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return min(1.0, float(torch.logsumexp(choose + k * math.log(rate) + (n - k) * math.log1p(-rate), 0).exp()))


def _xlog(a: float, b: float) -> float:
    return a * math.log(a / b) if a else 0.0
