"""When an exit is sure enough: a measure of its answer against a threshold."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.arguments import between, typed
from lightning_distill.functional import agreement_run, confidence, margin, normalized_entropy

State = tuple[Tensor, ...]


@typed
class Criterion:
    """A measure of how sure an exit is, and the threshold it must pass.

    A criterion is a few pure functions. What it has to remember of a row from exit to exit is a tuple of tensors whose
    first dimension is the rows, so that rows can be taken out of it.

    Args:
        threshold: What the measure is compared with; None where each exit has its own.

    Raises:
        ValueError: If the threshold is outside ``bounds``.
    """

    #: The lowest and the highest threshold there can be.
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    #: Whether a larger measure is a surer one.
    rising: ClassVar[bool] = True
    #: Whether the answer of one exit depends on those before it.
    remembers: ClassVar[bool] = False
    #: Whether ramps need a gate.
    needs_gate: ClassVar[bool] = False

    def __init__(self, threshold: float | None = None) -> None:
        if threshold is not None:
            self.check(threshold)
        self.threshold = threshold

    def check(self, threshold: float, name: str = "threshold") -> None:
        """Refuse a threshold out of range."""
        low, high = self.bounds
        between(name, threshold, low, high, closed=True)

    def begin(self, shape: torch.Size, device: torch.device) -> State:
        """What is remembered of rows (or tokens) of a shape before the first exit."""
        return ()

    def measure(self, logits: Tensor, gate: Tensor | None, state: State) -> tuple[Tensor, State]:
        """How sure an exit is.

        Args:
            logits: The ramp's, shape ``[..., C]``.
            gate: The ramp's gate, shape ``[...]``, or None.
            state: What is remembered.

        Returns:
            The measure ``[...]`` and what is remembered now.
        """
        raise NotImplementedError

    def sure(self, measure: Tensor, threshold: float) -> Tensor:
        """Where the measure passes the threshold, as bool ``[...]``; never where it is NaN."""
        return measure > threshold if self.rising else measure < threshold

    def config(self) -> dict[str, Any]:
        """Name and arguments, as primitives."""
        return {"name": type(self).__name__, **vars(self)}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class Confidence(Criterion):
    """Leaves where the largest probability is above the threshold.

    Example:
        >>> import torch
        >>> from lightning_distill.early_exit import Confidence
        >>> criterion = Confidence(0.9)
        >>> measure, _ = criterion.measure(torch.tensor([[0.0, 1.0], [0.0, 5.0]]), None, ())
        >>> criterion.sure(measure, criterion.threshold)
        tensor([False,  True])
    """

    def measure(self, logits: Tensor, gate: Tensor | None, state: State) -> tuple[Tensor, State]:
        """The largest probability."""
        return confidence(logits), state


class Entropy(Criterion):
    """Leaves where the entropy, as a share of the largest possible, is below the threshold.

    Source: Xin et al., "DeeBERT", 2020.
    """

    rising = False

    def measure(self, logits: Tensor, gate: Tensor | None, state: State) -> tuple[Tensor, State]:
        """The normalised entropy."""
        return normalized_entropy(logits), state


class Margin(Criterion):
    """Leaves where the two largest probabilities are further apart than the threshold."""

    def measure(self, logits: Tensor, gate: Tensor | None, state: State) -> tuple[Tensor, State]:
        """The distance of the two largest probabilities."""
        return margin(logits), state


class LearnedGate(Criterion):
    """Leaves where a learned gate gives the ramp a chance of being right above the threshold.

    Source: Xin et al., "BERxiT", 2021.
    """

    needs_gate = True

    def measure(self, logits: Tensor, gate: Tensor | None, state: State) -> tuple[Tensor, State]:
        """The gate's probability."""
        assert gate is not None
        return gate.float().sigmoid(), state


@typed
class Patience(Criterion):
    """Leaves where ``threshold`` exits in a row agreed with the one before them.

    Args:
        threshold: How many.
        tolerance: In regression, answers nearer than this agree; None compares classes.

    Example:
        >>> import torch
        >>> from lightning_distill.early_exit import Patience
        >>> criterion, logits = Patience(1), torch.tensor([[0.0, 1.0]])
        >>> state = criterion.begin(torch.Size([1]), logits.device)
        >>> for _ in range(2):
        ...     measure, state = criterion.measure(logits, None, state)
        ...     print(criterion.sure(measure, criterion.threshold).item())
        False
        True

    Source: Zhou et al., "BERT Loses Patience", 2020.
    """

    bounds = (1.0, math.inf)
    remembers = True

    def __init__(self, threshold: int | None = None, tolerance: float | None = None) -> None:
        super().__init__(threshold)
        if tolerance is not None:
            between("tolerance", tolerance, 0)
        self.tolerance = tolerance

    def begin(self, shape: torch.Size, device: torch.device) -> State:
        """No answer and no agreement yet."""
        return torch.full(shape, math.nan, device=device), torch.zeros(shape, device=device)

    def measure(self, logits: Tensor, gate: Tensor | None, state: State) -> tuple[Tensor, State]:
        """The number of agreements in a row."""
        previous, run = state
        answer, run = agreement_run(logits, previous, run, self.tolerance)
        return run, (answer, run)

    def sure(self, measure: Tensor, threshold: float) -> Tensor:
        """Where there are at least so many."""
        return measure >= threshold


class AnyOf(Criterion):
    """Leaves where at least one criterion is sure, each by its own threshold.

    Args:
        *criteria: Criteria with a threshold.

    Example:
        >>> import torch
        >>> from lightning_distill.early_exit import AllOf, Confidence, Margin
        >>> criterion = AllOf(Confidence(0.5), Margin(0.9))
        >>> measure, _ = criterion.measure(torch.tensor([[0.0, 1.0], [0.0, 5.0]]), None, criterion.begin((2,), "cpu"))
        >>> criterion.sure(measure, criterion.threshold)
        tensor([False,  True])
    """

    _need_all = False

    def __init__(self, *criteria: Criterion) -> None:
        if not criteria or any(criterion.threshold is None for criterion in criteria):
            raise ValueError(f"Expected argument `criteria` to be criteria with a threshold, but got {criteria}.")
        super().__init__(0.5)
        self.criteria = criteria
        self.remembers = any(criterion.remembers for criterion in criteria)  # type: ignore[misc]
        self.needs_gate = any(criterion.needs_gate for criterion in criteria)  # type: ignore[misc]

    def begin(self, shape: torch.Size, device: torch.device) -> State:
        """What all of them remember, one after the other."""
        return tuple(tensor for criterion in self.criteria for tensor in criterion.begin(shape, device))

    def measure(self, logits: Tensor, gate: Tensor | None, state: State) -> tuple[Tensor, State]:
        """1 where they are sure and 0 elsewhere."""
        answers, after, rest = [], list[Tensor](), list(state)
        for criterion in self.criteria:
            count = len(criterion.begin(torch.Size([0]), logits.device))
            value, own = criterion.measure(logits, gate, tuple(rest[:count]))
            assert criterion.threshold is not None
            answers.append(criterion.sure(value, criterion.threshold))
            after, rest = [*after, *own], rest[count:]
        together = torch.stack(answers)
        return (together.all(0) if self._need_all else together.any(0)).float(), tuple(after)

    def config(self) -> dict[str, Any]:
        """Name and criteria, as primitives."""
        return {"name": type(self).__name__, "criteria": [criterion.config() for criterion in self.criteria]}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.criteria))})"


class AllOf(AnyOf):
    """Leaves where every criterion is sure, each by its own threshold; see :class:`AnyOf`."""

    _need_all = True


_BY_NAME = {kind.__name__: kind for kind in (Confidence, Entropy, Margin, LearnedGate, Patience, AnyOf, AllOf)}


def criterion_from(config: dict[str, Any]) -> Criterion:
    """The criterion that :meth:`Criterion.config` describes.

    Raises:
        ValueError: If no criterion has the name.

    Example:
        >>> from lightning_distill.early_exit.criteria import criterion_from
        >>> criterion_from({"name": "Entropy", "threshold": 0.2})
        Entropy(threshold=0.2)
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in _BY_NAME:
        raise ValueError(f"Expected argument `criterion` to name one of {sorted(_BY_NAME)}, but got {name!r}.")
    if "criteria" in arguments:
        return _BY_NAME[name](*map(criterion_from, arguments["criteria"]))  # type: ignore[arg-type]
    return _BY_NAME[name](**arguments)
