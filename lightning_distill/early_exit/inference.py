"""What a student with ramps answers: its own forward, which each row leaves at the first exit that is sure of it."""

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from lightning_distill.arguments import between
from lightning_distill.early_exit.criteria import Criterion, State
from lightning_distill.early_exit.ramps import Ramps
from lightning_distill.early_exit.walk import (
    BatchDimensions,
    Cost,
    Rows,
    UnknownArgumentsError,
    caught_layers,
    count_rows,
    first_tensor,
    fresh,
)
from lightning_distill.models.batch import token_mask
from lightning_distill.models.calling import call_model, evaluating, logits_of
from lightning_distill.models.class_names import class_names
from lightning_distill.tasks import TASKS

Thresholds = float | Mapping[int, float]


class Prediction(NamedTuple):
    """What :meth:`EarlyExitModel.predict` gives: logits ``[B, C]`` (or ``[B, T, C]``), exit layer (from 0) ``[B]``."""

    logits: Tensor
    exit_layer: Tensor


class EarlyExitInference(L.LightningModule):
    """The forward of :class:`lightning_distill.early_exit.EarlyExitModel`, which says what the arguments are."""

    def __init__(
        self,
        student: nn.Module,
        ramps: Ramps | None = None,
        thresholds: Thresholds | None = None,
        criterion: Criterion | None = None,
        *,
        temperatures: Mapping[int, float] | None = None,
        sort: bool = False,
    ) -> None:
        super().__init__()
        if ramps is None:
            ramps = getattr(student, "ramps", None)
        if not isinstance(ramps, Ramps):
            raise ValueError(
                f"Expected argument `student` to hold ramps, but this `{type(student).__name__}` has none. Pass "
                "`make_ramps(student)` and train them, or train with the callback EarlyExit."
            )
        ramps.check_classes(student)
        student.ramps = ramps
        self.student = student
        #: The names of the classes in the order of the logits, None where the student has none.
        self.class_names = class_names(student, "student")
        self.layers = ramps.stack(student)
        self.criterion = ramps.criterion if criterion is None else criterion
        self.temperatures = {int(layer): value for layer, value in (temperatures or {}).items()}
        for layer, value in self.temperatures.items():
            between(f"temperatures[{layer}]", value, 0)
        self.thresholds = thresholds
        self.sort = sort
        self.nonfinite_rows = 0
        self.cost = Cost()
        self._dimensions = BatchDimensions()
        self._check_criterion()
        self.eval()

    def _check_criterion(self) -> None:
        criterion = self.criterion
        if criterion.needs_gate and not self.ramps.criterion.needs_gate:
            raise ValueError(
                f"Expected argument `criterion` to need no gate, but got {criterion!r} and ramps without one; train "
                "them with `criterion=LearnedGate()`."
            )
        parts = getattr(criterion, "criteria", (criterion,))
        if self.ramps.task == "regression" and not all(getattr(part, "tolerance", None) for part in parts):
            raise ValueError(
                f"Expected argument `criterion` to be Patience with a `tolerance` in regression, but got {criterion!r}."
            )

    @property
    def ramps(self) -> Ramps:
        """The ramps by layer."""
        ramps = self.student.ramps
        assert isinstance(ramps, Ramps)
        return ramps

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def thresholds(self) -> dict[int, float]:
        """The threshold of each exit that is used, by layer."""
        return dict(self._thresholds)

    @thresholds.setter
    def thresholds(self, thresholds: Thresholds | None) -> None:
        if thresholds is None:
            thresholds = {} if self.criterion.threshold is None else self.criterion.threshold
        exits = self.ramps.exits
        chosen = dict(thresholds) if isinstance(thresholds, Mapping) else dict.fromkeys(exits, thresholds)
        for layer, threshold in chosen.items():
            if layer not in exits:
                raise ValueError(
                    f"Expected argument `thresholds` to name exits of {list(exits)}, but got {layer!r}. They "
                    f"count from 0, of {self.depth} layers."
                )
            self.criterion.check(threshold, f"thresholds[{layer}]")
        self._thresholds = chosen

    def settings(self) -> dict[str, Any]:
        """Criterion, thresholds and temperatures, as JSON can hold them."""
        config = self.criterion.config()
        return {"criterion": config, "thresholds": self.thresholds, "temperatures": self.temperatures}

    def forward(self, batch: Any = None, **inputs: Any) -> Tensor:
        """Logits of a batch, or of inputs by name as the student takes them; see :meth:`predict`."""
        return self.predict(inputs if batch is None else batch).logits

    @torch.no_grad()
    def predict(self, batch: Any) -> Prediction:
        """Answer a batch, each row at the first exit that is sure of it.

        Args:
            batch: A mapping with the student's inputs, a pair, or a tensor; rows come first.

        Returns:
            Logits ``[B, C]`` (or ``[B, T, C]``) and the layer (from 0) each row left behind, int64 ``[B]``; the last
            layer for rows that no exit was sure of.
        """
        with evaluating(self.student) if self.student.training else nullcontext():
            try:
                return _Pass(self, batch).run()
            except UnknownArgumentsError:
                self._dimensions.learn(self.student, self.layers, batch)
                return _Pass(self, batch).run()

    @torch.no_grad()
    def answers(self, batch: Any) -> tuple[dict[int, tuple[Tensor, Tensor | None]], Tensor]:
        """What every ramp and the student itself say of a batch, without an exit.

        Args:
            batch: As in :meth:`predict`.

        Returns:
            Logits (not divided by a temperature) and gate of each ramp, by layer, and the student's logits.
        """
        real = token_mask(batch)
        found = {}

        def call(position: int, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = inner(*args, **kwargs)
            if position in self.ramps.exits:
                found[position] = self.ramps.ask(position, first_tensor(output), real)
            return output

        with caught_layers(self.student, self.layers, call):
            logits = logits_of(call_model(self.student, fresh(batch)))
        return found, logits

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each layer and each ramp, as the batch shrinks between them; arguments are those of torch.compile."""
        for module in (*self.layers, *self.ramps.values()):
            module.compile(*args, **{"dynamic": True, **kwargs})


class _Pass:
    """One batch on its way through the layers."""

    def __init__(self, model: EarlyExitInference, batch: Any) -> None:
        self.model, self.batch = model, batch
        self.exits = sorted(model.thresholds)
        self.state: State | None = None
        self.done: Any = None  # what the layers after the last row's exit give
        self.left: Tensor | None = None  # which of the rows that are carried have left; None while none has
        self.left_at: list[tuple[int, Tensor, Tensor]] = []  # exit layer, rows of the batch, their logits
        self.asked: list[tuple[Tensor, Tensor | None]] = []  # logits of each exit, and which rows had left before

    def run(self) -> Prediction:
        model = self.model
        self.lap_began, self.since = time.perf_counter(), -1
        if self.exits:
            self.total = count_rows(self.batch)
            with caught_layers(model.student, model.layers, self.call):
                logits = logits_of(call_model(model.student, fresh(self.batch)))
        else:
            logits = logits_of(call_model(model.student, self.batch))
        exit_layer = torch.full((len(logits),), model.depth - 1, device=logits.device)
        for layer, index, answer in self.left_at:
            logits = logits.index_copy(0, index, answer.to(logits.dtype))
            exit_layer[index] = layer
        self.count_nonfinite()
        return Prediction(logits, exit_layer)

    def call(self, position: int, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.done is not None:
            return self.done
        if position == 0:
            device = first_tensor(args or tuple(kwargs.values())).device
            real = token_mask(self.batch)
            if real is not None and bool(real.all()):
                real = None
            self.rows = Rows(self.total, device, real, self.model._dimensions)
        args, kwargs = self.rows.arguments(position, args, kwargs)
        output = inner(*args, **kwargs)
        if position == self.model.depth - 1:
            return self.rows.put_back(position, output)
        return self.exit(position, (args, kwargs), output) if position in self.exits else output

    def exit(self, position: int, arguments: Any, output: Any) -> Any:
        """Let the rows go that are sure; returns the layer's output for those that are carried on."""
        model, rows = self.model, self.rows
        logits, gate = model.ramps.ask(position, first_tensor(output), rows.token_mask)
        measure, sure = self.judge(position, logits, gate)
        self.asked.append((logits, self.left))
        if self.left is not None:
            sure &= ~self.left
        leaving = sure.nonzero().squeeze(1)  # waits for the device
        layers, self.since = position - self.since, position
        model.cost.layer = min(model.cost.layer, self.lap() / layers / len(rows))
        if not len(leaving):
            return output
        self.left_at.append((position, rows.index[leaving], logits[leaving]))
        self.left = sure if self.left is None else self.left | sure
        staying = (~self.left).nonzero().squeeze(1)
        if not len(staying):
            self.done = rows.put_back(position, output)
            return self.done
        following = next((layer for layer in self.exits if layer > position), model.depth - 1)
        if not model.cost.worth_cutting(len(rows) - len(staying), len(staying), following - position):
            return output
        if model.sort and len(rows) == self.total:
            staying = staying[measure[staying].argsort(descending=not model.criterion.rising)]
        self.lap()
        output = rows.keep(position, staying, arguments, output)
        self.left = None
        self.state = tuple(tensor[staying] for tensor in self.state or ())
        model.cost.cut = min(model.cost.cut, self.lap() / len(staying))
        return output

    def lap(self) -> float:
        """Seconds since the last lap. At an exit the host has waited for the device, so they hold the device's work."""
        began, self.lap_began = self.lap_began, time.perf_counter()
        return self.lap_began - began

    def judge(self, position: int, logits: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each row's measure (the least sure of its tokens' or labels') and whether it is sure."""
        model, criterion = self.model, self.model.criterion
        task = TASKS[model.ramps.task]
        logits = task.answers(logits)
        if self.state is None:
            self.state = criterion.begin(logits.shape[:-1], logits.device)
        temperature = model.temperatures.get(position, 1.0)
        scaled = logits if temperature == 1.0 else logits / temperature
        measure, self.state = criterion.measure(scaled, gate, self.state)
        sure = criterion.sure(measure, model.thresholds[position])
        if gate is not None:  # every other measure is of the logits themselves, and NaN where they are
            sure &= logits.isfinite().all(-1)
        if measure.ndim > 1:
            real = self.rows.token_mask
            if real is not None and task.of_tokens:
                hardest = float("inf") if criterion.rising else float("-inf")
                sure, measure = sure | ~real, measure.masked_fill(~real, hardest)
            sure = sure.all(1)
            measure = measure.amin(1) if criterion.rising else measure.amax(1)
        return measure, sure

    def count_nonfinite(self) -> None:
        """Count the rows that a ramp had no finite answer for, once for the batch: it is rare, and looking costs."""
        if not self.asked or bool(torch.cat([logits.flatten() for logits, _ in self.asked]).isfinite().all()):
            return
        count = 0
        for logits, left in self.asked:
            bad = ~logits.isfinite().flatten(1).all(1)
            count += int((bad if left is None else bad & ~left).sum())
        if count and not self.model.nonfinite_rows:
            warnings.warn(
                "Expected the ramps to give finite logits, but got NaN or infinite ones. Those rows go on to the next "
                "exit; `nonfinite_rows` counts them.",
                stacklevel=2,
            )
        self.model.nonfinite_rows += count
