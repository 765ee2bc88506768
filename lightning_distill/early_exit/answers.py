"""What every ramp and the full model say of a data set, asked once."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_distill.early_exit.criteria import Criterion
from lightning_distill.early_exit.inference import EarlyExitInference
from lightning_distill.models.batch import IGNORE_INDEX
from lightning_distill.tasks import TASKS


@dataclass
class Answers:
    """What every ramp and the full model said of a data set, one row per item (a sequence, a real token, or a label).

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
        return int(self.sequence[-1]) + 1 if len(self.sequence) else 0

    @classmethod
    def joined(cls, parts: Sequence["Answers"]) -> "Answers":
        """Those of several batches, whose sequences are numbered on."""
        starts = torch.tensor([0, *map(len, parts)]).cumsum(0)
        gates = [part.gates for part in parts if part.gates is not None]
        return cls(
            torch.cat([part.logits for part in parts], 1),
            torch.cat(gates, 1) if gates else None,
            torch.cat([part.labels for part in parts]),
            torch.cat([part.sequence + start for part, start in zip(parts, starts, strict=False)]),
        )

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

    def accuracy(self) -> Tensor:
        """Share of the items that are right, ``[E + 1, N]``."""
        return self.mean_of_items((self.logits.argmax(-1) == self.labels).float())

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


def collect(model: EarlyExitInference, dataloader: Iterable[Any]) -> Answers:
    """Run the student and every ramp once over a data set; the answers are on the CPU.

    Rows without a label are left out; where no row has one, the labels are the full model's answers.

    Raises:
        ValueError: If there are no rows, or labels of one class only.
    """
    parts = [_answers_of(model, batch) for batch in dataloader]
    if not parts:
        raise ValueError("Expected argument `dataloader` to give calibration rows, but got none.")
    answers = Answers.joined(parts)
    has_label = answers.labels != IGNORE_INDEX
    if not has_label.any():
        return replace(answers, labels=answers.logits[-1].argmax(-1))
    if not has_label.all():
        rows = answers.sequence[has_label].unique()
        warnings.warn(
            f"{len(answers) - len(rows)} of {len(answers)} calibration rows have no label and are left out: the "
            "promise is about rows like those that have one.",
            stacklevel=4,
        )
        answers = answers.take(rows, has_label)
    if len(answers.labels.unique()) < 2:
        raise ValueError(
            f"Expected argument `dataloader` to give rows of at least two classes, but all {len(answers)} have the "
            f"label {int(answers.labels[0])}. Shuffle before taking a part of the data."
        )
    return answers


@torch.no_grad()
def _answers_of(model: EarlyExitInference, batch: Any) -> Answers:
    task, device = model.ramps.task, next(model.parameters()).device
    batch = move_data_to_device(batch, device)
    asked, final = model.answers(batch)
    final, labels, mask = TASKS[task].align(final, batch)
    if labels is None:
        labels = torch.full(final.shape[:-1], IGNORE_INDEX, device=device)
    labels = TASKS[task].classes(labels)
    items = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    # A sequence without a real item would have no measure: it is not counted.
    counted = items.view(len(items), -1).any(1)
    sequence = (counted.cumsum(0) - 1).view(-1, *[1] * (items.ndim - 1)).expand(items.shape)
    logits = torch.stack([*(TASKS[task].answers(logits) for logits, _ in asked.values()), final])[:, items]
    gates = [gate for _, gate in asked.values() if gate is not None]
    return Answers(
        logits.float().cpu(),
        torch.stack(gates)[:, items].float().cpu() if gates else None,
        labels[items].cpu(),
        sequence[items].cpu(),
    )
