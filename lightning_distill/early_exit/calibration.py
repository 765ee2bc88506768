"""Thresholds from data, with a promise about rows nobody has seen."""

import json
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_distill import tasks
from lightning_distill.arguments import between, typed
from lightning_distill.early_exit.criteria import AnyOf, Criterion
from lightning_distill.early_exit.guarantee import harm_p_value, rows_needed
from lightning_distill.early_exit.model import EarlyExitModel
from lightning_distill.early_exit.plots import plot_calibration
from lightning_distill.early_exit.search import exits_of, fit_temperature, threshold_path
from lightning_distill.models.batch import IGNORE_INDEX
from lightning_distill.models.folders import check_folder, writing


@dataclass
class Answers:
    """What every ramp and the full model said of a data set, one row per item (a sequence, or a real token).

    Args:
        logits: Shape ``[E + 1, M, C]``, the full model's last.
        gates: Shape ``[E, M]``, or None.
        labels: Shape ``[M]``; the full model's own answers where no row of the data has one.
        sequence: The sequence of each item, int64 ``[M]``, from 0 to N - 1.
    """

    logits: Tensor
    gates: Tensor | None
    labels: Tensor
    sequence: Tensor

    def __len__(self) -> int:
        return int(self.sequence[-1]) + 1

    def take(self, sequences: Tensor, among: Tensor | None = None) -> "Answers":
        """The items of some sequences, which are numbered anew in their old order; of bool ``[M]``, those among."""
        kept = torch.zeros(len(self), dtype=torch.bool)
        kept[sequences] = True
        items = kept[self.sequence] if among is None else kept[self.sequence] & among
        gates = None if self.gates is None else self.gates[:, items]
        renumbered = (kept.cumsum(0) - 1)[self.sequence[items]]
        return Answers(self.logits[:, items], gates, self.labels[items], renumbered)

    def only(self, exits: list[int]) -> "Answers":
        """What some of the exits said, by their place, and the full model."""
        gates = None if self.gates is None else self.gates[exits]
        return replace(self, logits=self.logits[[*exits, -1]], gates=gates)

    def mean_of_items(self, values: Tensor) -> Tensor:
        """Mean over the items of each sequence: ``[..., M]`` to ``[..., N]``."""
        return self._reduce(values, "mean")

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        empty = values.new_zeros((*values.shape[:-1], len(self)))
        return empty.scatter_reduce(-1, self.sequence.expand(values.shape), values, how, include_self=False)

    def harm(self) -> Tensor:
        """Share of the items that an exit spoils: the full model is right and it is wrong, ``[E + 1, N]``."""
        right = self.logits.argmax(-1) == self.labels
        return self.mean_of_items((right[-1] & ~right).float())

    def measures(self, criterion: Criterion, temperatures: list[float]) -> Tensor:
        """How sure each exit is of each sequence, of its hardest item; larger is surer, ``[E, N]``."""
        state = criterion.begin(self.labels.shape, self.labels.device)
        found = []
        for place, temperature in enumerate(temperatures):
            gate = None if self.gates is None else self.gates[place]
            measure, state = criterion.measure(self.logits[place] / temperature, gate, state)
            measure = measure.masked_fill(~self.logits[place].isfinite().all(-1), math.nan)
            found.append(measure if criterion.rising else -measure)
        return self._reduce(torch.stack(found), "amin")


@dataclass
class Calibration:
    """What :func:`calibrate` found. Numbers about accuracy are of the rows that the promise was tested on.

    Attributes:
        thresholds: By exit layer; empty where nothing may leave.
        temperatures: By exit layer.
        metric_full: Accuracy of the full model (agreement with itself, so 1, without labels).
        metric_early: Accuracy with early exits.
        mean_depth: Mean number of layers run.
        depth: Number of layers.
        exit_share: Share of rows that leave at each exit layer; the last layer's is the rest.
        accuracy: Accuracy of each ramp on all rows, and of the full model.
        calibration_error: Expected calibration error of each ramp before and after the temperature, 15 bins.
        frontier: ``[mean depth, accuracy]`` along the path of threshold sets.
        guarantee: What is promised: ``max_drop``, ``confidence``, ``holds``, ``p_value``, ``rows`` it was tested on,
            ``rows_needed`` of calibration data where it does not hold (None: no number is enough), ``method``.
    """

    thresholds: dict[int, float]
    temperatures: dict[int, float]
    metric_full: float
    metric_early: float
    mean_depth: float
    depth: int
    exit_share: dict[int, float]
    accuracy: dict[int, float]
    calibration_error: dict[int, tuple[float, float]]
    frontier: list[tuple[float, float]] = field(default_factory=list)
    guarantee: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All of it as primitives, with strings as keys."""
        return {
            name: {str(key): item for key, item in value.items()} if isinstance(value, dict) else value
            for name, value in asdict(self).items()
        }

    def write(self, model: EarlyExitModel, folder: str | os.PathLike[str]) -> None:
        """Write the model's ramps, ``early_exit.json`` (with this report) and ``early_exit.png``.

        Args:
            model: The calibrated model.
            folder: Where to write: a new folder, or one that was written here, whose other files stay.

        Raises:
            ValueError: If the folder holds anything else.
        """
        with writing(folder, keep=True) as draft:
            model.ramps.save(draft, **model.settings(), calibration=json.loads(json.dumps(self.as_dict())))
            plot_calibration(self, draft / "early_exit.png")


@typed
def calibrate(
    model: EarlyExitModel,
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
        model: The model; its thresholds and temperatures are set.
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

    Returns:
        The report.

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
    criterion, ramps, depth = model.criterion, list(model.ramps.exits), model.depth
    exits = ramps if exits is None else sorted(set(exits))
    if folder is not None:
        check_folder(folder)
    if not exits or not set(exits) <= set(ramps):
        raise ValueError(f"Expected argument `exits` to name exits of {ramps}, but got {exits}.")
    if isinstance(criterion, AnyOf) or model.ramps.task == "regression":
        raise ValueError(
            "Expected a model with one criterion that classifies, whose threshold can be found, but got "
            f"{criterion!r} in {model.ramps.task}. Set `model.thresholds` or its parts by hand."
        )
    report = choose(
        collect(model, dataloader).only([ramps.index(layer) for layer in exits]),
        criterion,
        [*exits, depth - 1],
        max_drop=max_drop,
        confidence=confidence,
        temperature_scaling=temperature_scaling,
        search_share=search_share,
        seed=seed,
    )
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

    Args:
        answers: What they said.
        criterion: When an exit is sure.
        layers: The exits' layers and the last layer.
        max_drop: See :func:`calibrate`, also for the next four.
        confidence: How sure the promise is.
        temperature_scaling: Whether to fit temperatures.
        search_share: Share of the rows for the path.
        seed: Decides which.
        path_size: Number of threshold sets to look for.

    Returns:
        The report.
    """
    exits, depth, rows = layers[:-1], layers[-1] + 1, len(answers)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    count = max(1, round(search_share * rows))
    if rows - count < 1:
        raise ValueError(f"Expected argument `dataloader` to give at least two rows, but got {rows}.")
    search, test = answers.take(order[:count]), answers.take(order[count:])
    temperatures = [
        fit_temperature(search.logits[index], search.labels) if temperature_scaling else 1.0
        for index in range(len(exits))
    ]
    depths = torch.tensor([*(layer + 1.0 for layer in exits), float(depth)])
    path = _path(criterion, search, temperatures, depths, path_size)
    measures, harm = test.measures(criterion, temperatures), test.harm()
    right = test.mean_of_items((test.logits.argmax(-1) == test.labels).float())

    def at(values: Tensor, leaves: Tensor) -> Tensor:
        return values.gather(0, leaves[None])[0]

    chosen, p_value, first_harm, testing = None, 1.0, 0.0, True
    frontier = [(float(depth), float(right[-1].mean()))]
    for index, thresholds in enumerate(path):
        leaves = exits_of(measures, thresholds)
        frontier.append((float(depths[leaves].mean()), float(at(right, leaves).mean())))
        if not testing:
            continue
        spoiled = at(harm, leaves)
        found = harm_p_value(spoiled, max_drop)
        first_harm = float(spoiled.mean()) if index == 0 else first_harm
        testing = found <= 1 - confidence
        if testing or chosen is None:
            p_value = found
        if testing:
            chosen, p_value = thresholds, found

    thresholds = torch.full((len(exits),), math.inf) if chosen is None else chosen
    leaves = exits_of(measures, thresholds)
    needed = None
    if chosen is None:
        needed = rows_needed(max_drop, confidence, first_harm)
        needed = None if needed is None else math.ceil(needed / (1 - search_share))
        more = f"about {needed} rows are needed" if needed else "more rows will not help: the ramps are not good enough"
        warnings.warn(
            f"Expected calibration data that can promise a drop of at most {max_drop} with confidence {confidence}, "
            f"but {rows} rows cannot, so nothing leaves early; {more}. Allow a larger `max_drop` or give more rows.",
            stacklevel=3,
        )
    return Calibration(
        thresholds=_as_user(criterion, exits, thresholds),
        temperatures=dict(zip(exits, temperatures, strict=True)),
        metric_full=float(right[-1].mean()),
        metric_early=float(at(right, leaves).mean()),
        mean_depth=float(depths[leaves].mean()),
        depth=depth,
        exit_share={layer: float((leaves == index).float().mean()) for index, layer in enumerate([*exits, depth - 1])},
        accuracy={layer: float(right[index].mean()) for index, layer in enumerate(layers)},
        calibration_error={
            layer: (_error(test, index, 1.0), _error(test, index, temperatures[index]))
            for index, layer in enumerate(exits)
        },
        frontier=frontier,
        guarantee={
            "max_drop": max_drop,
            "confidence": confidence,
            "holds": chosen is not None,
            "p_value": p_value,
            "rows": len(test),
            "rows_needed": needed,
            "method": "Learn then Test, fixed sequence; exact binomial (Clopper-Pearson) or Hoeffding-Bentkus p-values",
        },
    )


@torch.no_grad()
def collect(model: EarlyExitModel, dataloader: Iterable[Any]) -> Answers:
    """Run the student and every ramp once over a data set.

    Args:
        model: The model.
        dataloader: Batches as in training.

    Returns:
        All answers, on the CPU.

    Raises:
        ValueError: If there are no rows, or labels of one class only.
    """
    task, device = model.ramps.task, next(model.parameters()).device
    kept: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
    start = 0
    for batch in dataloader:
        batch = move_data_to_device(batch, device)
        asked, final = model.answers(batch)
        final, labels, mask = tasks.align(task, final, batch)
        if labels is None:
            labels = torch.full(final.shape[:-1], IGNORE_INDEX, device=device)
        answer = labels.argmax(-1) if labels.is_floating_point() else labels
        items = torch.ones_like(answer, dtype=torch.bool) if mask is None else mask
        sequence = torch.arange(len(answer), device=device).view(-1, *[1] * (answer.ndim - 1)).expand(answer.shape)
        # A sequence without a real item would have no measure.
        there = items.flatten(1).any(1) if items.ndim > 1 else items
        renumbered = (there.cumsum(0) - 1 + start)[sequence]
        start += int(there.sum())
        logits = torch.stack([*(tasks.answers(task, logits) for logits, _ in asked.values()), final])[:, items]
        all_gates = [gate for _, gate in asked.values() if gate is not None]
        gates = torch.stack(all_gates)[:, items].float().cpu() if all_gates else None
        kept.append((logits.float().cpu(), gates, answer[items].cpu(), renumbered[items].cpu()))
    if not kept:
        raise ValueError("Expected argument `dataloader` to give calibration rows, but got none.")
    with_gates = [gate for _, gate, _, _ in kept if gate is not None]
    answers = Answers(
        torch.cat([part for part, _, _, _ in kept], 1),
        torch.cat(with_gates, 1) if with_gates else None,
        torch.cat([part for _, _, part, _ in kept]),
        torch.cat([part for _, _, _, part in kept]),
    )
    has_label = answers.labels != IGNORE_INDEX
    if not has_label.any():
        answers.labels = answers.logits[-1].argmax(-1)
        return answers
    if not has_label.all():
        rows = answers.sequence[has_label].unique()
        warnings.warn(
            f"{len(answers) - len(rows)} of {len(answers)} calibration rows have no label and are left out: the "
            "promise is about rows like those that have one.",
            stacklevel=3,
        )
        answers = answers.take(rows, has_label)
    if len(answers.labels.unique()) < 2:
        raise ValueError(
            f"Expected argument `dataloader` to give rows of at least two classes, but all {len(answers)} have the "
            f"label {int(answers.labels[0])}. Shuffle before taking a part of the data."
        )
    return answers


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
