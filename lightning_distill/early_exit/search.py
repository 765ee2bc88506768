"""Thresholds, one per exit, from what the ramps said of a data set; the models are not run again."""

import math

import torch
from torch import Tensor


def exits_of(measures: Tensor, thresholds: Tensor) -> Tensor:
    """The exit each row leaves at, int64 ``[N]``; E for rows that go to the end.

    Args:
        measures: Shape ``[E, N]``; larger is surer, NaN is never sure.
        thresholds: Shape ``[E]``; a row leaves at the first exit whose measure is above its threshold.

    Example:
        >>> import torch
        >>> from lightning_distill.early_exit.search import exits_of
        >>> exits_of(torch.tensor([[0.9, 0.6, 0.5], [0.5, 0.9, 0.5]]), torch.tensor([0.8, 0.8]))
        tensor([0, 1, 2])
    """
    sure = measures > thresholds[:, None]
    last = torch.ones_like(sure[:1])
    return torch.cat([sure, last]).to(torch.uint8).argmax(0)


def threshold_path(measures: Tensor, losses: Tensor, depths: Tensor, *, size: int = 80, sweeps: int = 4) -> Tensor:
    r"""Sets of thresholds from the most careful to the fastest.

    Each set minimises :math:`\frac{1}{N}\sum_n depth_n + \mu\, loss_n` over the thresholds for one price
    :math:`\mu` of a loss, by coordinate descent: with the other exits fixed, the best threshold of one exit is found
    exactly, by sorting the rows that reach it and summing what each saves by leaving.

    Args:
        measures: Shape ``[E, N]``; larger is surer, NaN is never sure.
        losses: Shape ``[E + 1, N]``: what is lost if a row leaves at an exit, or at the end.
        depths: Shape ``[E + 1]``: layers run up to each exit, and all of them.
        size: Number of prices, in a geometric row from where no row leaves.
        sweeps: Rounds over the exits for one price.

    Returns:
        Thresholds ``[P, E]``, infinite where nothing leaves; mean depth falls along the path.

    Example:
        >>> import torch
        >>> from lightning_distill.early_exit.search import threshold_path
        >>> measures = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
        >>> losses = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
        >>> threshold_path(measures, losses, torch.tensor([1.0, 2.0]))[0]
        tensor([0.7500])

    Source: the objective is that of Laufer-Goldenberg et al., "Efficiently Controlling Multiple Risks with Pareto
    Testing", 2023.
    """
    thresholds = torch.full((len(measures),), math.inf, dtype=measures.dtype)
    deepest = float(depths[-1])
    found: list[Tensor] = []
    last_depth = deepest
    for price in torch.logspace(math.log10(1000 * deepest), math.log10(0.5), size):
        costs = depths[:, None] + price * losses
        for _ in range(sweeps):
            before = thresholds.clone()
            for exit_index in reversed(range(len(measures))):
                thresholds[exit_index] = _best(exit_index, measures, costs, thresholds)
            if torch.equal(before, thresholds):
                break
        depth = float(depths[exits_of(measures, thresholds)].mean())
        if depth < last_depth:
            found.append(thresholds.clone())
            last_depth = depth
    return torch.stack(found) if found else thresholds[None]


def _best(exit_index: int, measures: Tensor, costs: Tensor, thresholds: Tensor) -> Tensor:
    others = thresholds.clone()
    others[exit_index] = math.inf
    leaves = exits_of(measures, others)
    reached = (leaves > exit_index) & ~measures[exit_index].isnan()
    measure, order = measures[exit_index, reached].sort(descending=True)
    if not len(measure):
        return thresholds.new_tensor(math.inf)
    going_on = costs.gather(0, leaves[None])[0, reached]
    saved = (going_on - costs[exit_index, reached])[order].cumsum(0)
    # Rows with one measure leave together or not at all.
    ends = torch.cat([measure[1:] < measure[:-1], torch.ones(1, dtype=torch.bool)])
    saved = saved.masked_fill(~ends, -math.inf)
    best = int(saved.argmax())
    if saved[best] <= 0:
        return thresholds.new_tensor(math.inf)
    below = measure[best + 1] if best + 1 < len(measure) else measure[best] - 1e-6
    return (measure[best] + below) / 2


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature, from 0.05 to 20, that logits ``[N, C]`` are to be divided by, of labels ``[N]``.

    Their probabilities are then worth what they say, by negative log-likelihood.

    Example:
        >>> import torch
        >>> from lightning_distill.early_exit.search import fit_temperature
        >>> logits = torch.tensor([[4.0, 0.0]] * 3 + [[0.0, 4.0]])  # sure, and right three times in four
        >>> round(fit_temperature(logits, torch.zeros(4, dtype=torch.long)), 2)
        3.64

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """
    good = logits.isfinite().all(-1)
    logits, labels = logits[good].double(), labels[good]
    low, high = math.log(0.05), math.log(20.0)
    if not len(logits):
        return 1.0
    for _ in range(4):  # the loss has one minimum; each round is ten times finer
        grid = torch.linspace(low, high, 41, dtype=torch.float64)
        likelihood = (logits / grid.exp()[:, None, None]).log_softmax(-1)
        scores = -likelihood.gather(-1, labels.expand(len(grid), -1)[..., None]).mean((1, 2))
        best, step = float(grid[scores.argmin()]), float(grid[1] - grid[0])
        low, high = max(best - step, math.log(0.05)), min(best + step, math.log(20.0))
    return math.exp(best)
