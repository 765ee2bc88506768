"""Thresholds from data, with a promise about rows nobody has seen."""

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_distill.arguments import between, typed
from lightning_distill.early_exit.answers import Answers, collect
from lightning_distill.early_exit.criteria import AnyOf, Criterion
from lightning_distill.early_exit.guarantee import harm_p_value, rows_needed
from lightning_distill.early_exit.inference import EarlyExitInference
from lightning_distill.early_exit.report import Calibration
from lightning_distill.early_exit.search import exits_of, fit_temperature, threshold_path
from lightning_distill.models.folders import check_folder

_METHOD = "Learn then Test, fixed sequence; exact binomial (Clopper-Pearson) or Hoeffding-Bentkus p-values"


@typed
def calibrate(
    model: EarlyExitInference,
    dataloader: Iterable[Any],
    *,
    exits: Sequence[int] | None = None,
    max_drop: float = 0.005,
    confidence: float = 0.95,
    temperature_scaling: bool = True,
    search_share: float = 0.2,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> Calibration:
    r"""Give a model the thresholds that run the fewest layers while accuracy falls by at most ``max_drop``.

    Every ramp is evaluated once. A part of the rows fits the temperatures and gives a path of threshold sets (one
    threshold per exit), from careful to fast. The other rows test the sets in this order, each by the p-value of
    :func:`lightning_distill.early_exit.guarantee.harm_p_value`, until the first fails; the last that passed is taken.
    So, whatever the distribution, with probability ``confidence`` over the calibration rows the accuracy that is lost
    on new rows of the same distribution is at most ``max_drop``. Rows must be independent, and neither student nor
    ramps may have been trained on them.

    Where no set passes, nothing leaves early, and a warning says how many rows it would take.

    Args:
        model: The :class:`EarlyExitModel`; its thresholds and temperatures are set.
        dataloader: Batches as in training. Rows without a label (none, or -100) are left out; where no row has one, the
            promise is about agreement with the full model.
        exits: The exits that may be used; None for all. A ramp costs every row that passes it, in small batches up to a
            tenth of a layer: two or three are often faster than all.
        max_drop: How much accuracy may be lost (per token, in token classification).
        confidence: How sure the promise is.
        temperature_scaling: Whether to divide each ramp's logits by a temperature of its own.
        search_share: Share of the rows that temperatures and path are found on.
        seed: Decides which.
        folder: Where to write ``early_exit.json`` (for ``from_pretrained``, with this report) and ``early_exit.png``:
            a new folder, or one that :meth:`EarlyExitModel.save_pretrained` or an export wrote, whose files stay.

    Raises:
        ValueError: If the data have one class only or no rows, the criterion has no threshold to be found, or an exit
            has no ramp.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.early_exit import EarlyExitModel, calibrate, make_ramps
        >>> _ = torch.manual_seed(0)
        >>> student = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
        >>> model = EarlyExitModel(student, make_ramps(student, layers="0"))
        >>> x = torch.randn(60, 4)
        >>> report = calibrate(model, [(x, (x[:, 0] > 0).long())], max_drop=0.6)
        >>> sorted(report.guarantee), report.depth
        (['confidence', 'holds', 'max_drop', 'method', 'p_value', 'rows', 'rows_needed'], 2)

    Source: Angelopoulos et al., "Learn then Test", 2021 (fixed-sequence testing); Laufer-Goldenberg et al.,
    "Efficiently Controlling Multiple Risks with Pareto Testing", 2023 (the path from a split of the data).
    """
    between("max_drop", max_drop, 0, 1)
    if max_drop == 1:
        raise ValueError("Expected argument `max_drop` to be below 1, but got 1; nothing would be promised.")
    between("confidence", confidence, 0.5, 1)
    between("search_share", search_share, 0.05, 0.9)
    if folder is not None:
        check_folder(folder)
    ramps = list(model.ramps.exits)
    exits = ramps if exits is None else sorted(set(exits))
    if not exits or not set(exits) <= set(ramps):
        raise ValueError(f"Expected argument `exits` to name exits of {ramps}, but got {exits}.")
    if isinstance(model.criterion, AnyOf) or model.ramps.task == "regression":
        raise ValueError(
            "Expected a model with one criterion that classifies, whose threshold can be found, but got "
            f"{model.criterion!r} in {model.ramps.task}. Set `model.thresholds` or its parts by hand."
        )
    answers = collect(model, dataloader).only([ramps.index(layer) for layer in exits])
    options: dict[str, Any] = {"temperature_scaling": temperature_scaling, "search_share": search_share, "seed": seed}
    layers = [*exits, model.depth - 1]
    report = choose(answers, model.criterion, layers, max_drop=max_drop, confidence=confidence, **options)
    model.temperatures, model.thresholds = report.temperatures, report.thresholds
    if folder is not None:
        report.write(model, folder)
    return report


def choose(
    answers: Answers,
    criterion: Criterion,
    layers: list[int],
    *,
    max_drop: float,
    confidence: float,
    temperature_scaling: bool = True,
    search_share: float = 0.2,
    seed: int = 0,
    path_size: int = 80,
) -> Calibration:
    """Choose thresholds from what the ramps and the full model said: :func:`calibrate` without a model.

    ``layers`` are those of the exits and the last; ``path_size`` is the number of threshold sets to look for.
    """
    exits = layers[:-1]
    search, test = _split(answers, search_share, seed)
    temperatures = [
        fit_temperature(logits, search.labels) if temperature_scaling else 1.0 for logits in search.logits[:-1]
    ]
    depths = torch.tensor([layer + 1.0 for layer in layers])
    # Before the first set of the path, nothing leaves.
    nothing = torch.full((1, len(exits)), math.inf)
    path = torch.cat([nothing, _path(criterion, search, temperatures, depths, path_size)])
    measures, harm, accuracy = test.measures(criterion, temperatures), test.harm(), test.accuracy()
    leaves = [exits_of(measures, thresholds) for thresholds in path]
    chosen, p_value = _passed((_at(harm, each) for each in leaves[1:]), max_drop, confidence)
    frontier = [(float(depths[each].mean()), float(_at(accuracy, each).mean())) for each in leaves]
    first_harm = float(_at(harm, leaves[:2][-1]).mean())
    return Calibration(
        thresholds=_as_user(criterion, exits, path[chosen]),
        temperatures=dict(zip(exits, temperatures, strict=True)),
        metric_full=frontier[0][1],
        metric_early=frontier[chosen][1],
        mean_depth=frontier[chosen][0],
        depth=layers[-1] + 1,
        exit_share={layer: float((leaves[chosen] == index).float().mean()) for index, layer in enumerate(layers)},
        accuracy={layer: float(accuracy[index].mean()) for index, layer in enumerate(layers)},
        calibration_error={
            layer: (_error(test, index, 1.0), _error(test, index, temperatures[index]))
            for index, layer in enumerate(exits)
        },
        frontier=frontier,
        guarantee={
            "max_drop": max_drop,
            "confidence": confidence,
            "holds": chosen > 0,
            "p_value": p_value,
            "rows": len(test),
            "rows_needed": None if chosen else _rows_needed(max_drop, confidence, first_harm, answers, search_share),
            "method": _METHOD,
        },
    )


def _split(answers: Answers, share: float, seed: int) -> tuple[Answers, Answers]:
    """The rows that temperatures and path are found on, and those that test them."""
    rows = len(answers)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    count = max(1, round(share * rows))
    if rows - count < 1:
        raise ValueError(f"Expected argument `dataloader` to give at least two rows, but got {rows}.")
    return answers.take(order[:count]), answers.take(order[count:])


def _at(values: Tensor, leaves: Tensor) -> Tensor:
    """The value of each row ``[N]`` at the exit that it leaves at, of ``[E + 1, N]``."""
    return values.gather(0, leaves[None])[0]


def _passed(harms: Iterable[Tensor], max_drop: float, confidence: float) -> tuple[int, float]:
    """How many sets pass before one fails, and the p-value of the last of them; where none does, of the first."""
    count, p_value = 0, 1.0
    for harm in harms:
        found = harm_p_value(harm, max_drop)
        p_value = found if found <= 1 - confidence or not count else p_value
        if found > 1 - confidence:
            break
        count += 1
    return count, p_value


def _rows_needed(max_drop: float, confidence: float, harm: float, answers: Answers, search_share: float) -> int | None:
    """How many rows it would take, with a warning."""
    needed = rows_needed(max_drop, confidence, harm)
    needed = None if needed is None else math.ceil(needed / (1 - search_share))
    more = f"about {needed} rows are needed" if needed else "more rows will not help: the ramps are not good enough"
    warnings.warn(
        f"Expected calibration data that can promise a drop of at most {max_drop} with confidence {confidence}, but "
        f"{len(answers)} rows cannot, so nothing leaves early; {more}. Allow a larger `max_drop` or give more rows.",
        stacklevel=5,
    )
    return needed


def _path(criterion: Criterion, search: Answers, temperatures: list[float], depths: Tensor, size: int) -> Tensor:
    """Sets of thresholds in the terms of :meth:`Answers.measures`, careful ones first."""
    if criterion.remembers:
        # What one exit measures depends on which others are asked: all of them, with one threshold.
        counts = torch.arange(len(temperatures) - 1, 0, -1.0)
        return (counts - 0.5)[:, None].expand(-1, len(temperatures))
    probabilities = torch.stack([(search.logits[i] / t).softmax(-1) for i, t in enumerate(temperatures)])
    full = search.logits[-1].argmax(-1)
    # The probability of another answer than the full model's, and not whether there was one: it is finer than a count
    # of the few rows that are spoiled, so the path has careful sets too.
    other = 1 - probabilities.gather(-1, full.expand(len(temperatures), -1)[..., None])[..., 0]
    losses = search.mean_of_items(torch.cat([other, torch.zeros_like(other[:1])]).nan_to_num(1.0))
    return threshold_path(search.measures(criterion, temperatures), losses, depths, size=size)


def _as_user(criterion: Criterion, exits: list[int], thresholds: Tensor) -> dict[int, float]:
    found = {}
    for layer, value in zip(exits, thresholds.tolist(), strict=True):
        if value != math.inf:
            low, high = criterion.bounds
            own = math.ceil(value) if criterion.remembers else value if criterion.rising else -value
            found[layer] = min(max(own, low), high)
    return found


def _error(answers: Answers, index: int, temperature: float) -> float:
    logits = answers.logits[index]
    good = logits.isfinite().all(-1)
    if not good.any():
        return math.nan
    probabilities = (logits[good] / temperature).softmax(-1)
    return float(
        multiclass_calibration_error(probabilities, answers.labels[good], num_classes=logits.shape[-1], n_bins=15)
    )
