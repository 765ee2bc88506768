"""What every objective is: a weight, a name, the signals it reads, a loss per item."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_distill.arguments import typed
from lightning_distill.functional.reduction import check_num_items
from lightning_distill.functional.terms import Term
from lightning_distill.objectives.schedule import Scheduled, value_at
from lightning_distill.signals.description import ModelInfo, near
from lightning_distill.signals.signals import Request, Signals, is_within
from lightning_distill.students.layer_map import layer_map


class Loss(NamedTuple):
    """An objective's value per item, so that a caller can take the exact mean over micro-batches and ranks.

    Args:
        values: Float32 (float64 for float64 signals), of any shape, one per row or token.
        mask: Bool of that shape, the items that count; None where all do.
        counts: Of that shape, what each item counts in the mean; None where each counts 1. The mean is the sum of the
            values over the sum of these.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import Loss
        >>> loss = Loss(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([True, True, False]))
        >>> loss.sum().item(), loss.count().item(), loss.mean().item()
        (4.0, 2, 2.0)
    """

    values: Tensor
    mask: Tensor | None = None
    counts: Tensor | None = None

    def sum(self) -> Tensor:
        """Sum over the items that count, a scalar."""
        return (self.values if self.mask is None else self.values.masked_fill(~self.mask, 0.0)).sum()

    # A tuple has a method of this name, which nobody needs here.
    def count(self) -> Tensor:  # type: ignore[override]
        """Number of items that count, an integer scalar; the sum of ``counts`` where there are any."""
        if self.counts is not None:
            return Loss(self.counts, self.mask).sum()
        if self.mask is None:
            return torch.tensor(self.values.numel(), device=self.values.device)
        return self.mask.sum()

    def mean(self, num_items: float | Tensor | None = None) -> Tensor:
        """Mean over the items that count, 0 where none does; or their sum over ``num_items``."""
        if num_items is not None:
            return self.sum() / check_num_items(num_items)
        count = self.count()
        return self.sum() / count.clamp(min=1 if self.counts is None else torch.finfo(count.dtype).tiny)


@typed
class Objective(nn.Module):
    """One thing the student learns from the teacher or the data. Subclasses define :meth:`forward`.

    Args:
        weight: Factor of its loss in the total, finite and at least 0; a number, or a function of the training's
            progress in [0, 1] such as :class:`LinearSchedule`.
        name: What it is logged as; the class's name in snake case where None.

    Raises:
        ValueError: If the weight is negative or not finite, now or at some progress.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import Loss, Objective
        >>> from lightning_distill.signals.signals import Signals
        >>> class Margin(Objective):
        ...     def forward(self, student, teacher):
        ...         return Loss((teacher.logits - student.logits).relu().mean(-1))
        >>> margin = Margin(weight=0.5)
        >>> margin.name, margin(Signals(torch.zeros(2, 3)), Signals(torch.ones(2, 3))).mean().item()
        ('margin', 1.0)
    """

    #: Whether :meth:`forward` reads the teacher; where no objective does, the teacher does not run.
    needs_teacher = True
    #: Whether :meth:`forward` reads logits; an objective that does not is no obstacle to not computing them.
    reads_logits = True
    #: Whether :meth:`forward` reads labels; a batch that has none counts nothing for it.
    needs_labels = False
    #: Whether it compares one class with the others, so that it means nothing in regression or label by label.
    needs_classes = False
    #: Whether it compares predictions over different vocabularies.
    any_vocabulary = False
    #: The total that it is a part of, logged as ``train_<total>``: a step minimises the sum of all totals, and a
    #: validation measures ``"loss"`` alone. What a callback adds has a total of its own.
    total = "loss"
    #: Whether it compares embeddings of other widths.
    any_width = False

    def __init__(self, weight: Scheduled = 1.0, name: str | None = None) -> None:
        super().__init__()
        self.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower() if name is None else name
        self._progress = 0.0
        self._check_scheduled("weight", weight, "finite and at least 0", lambda value: value >= 0)
        self._weight = weight
        #: What :meth:`forward` reads of each model, beside logits, labels and masks; set by :meth:`bind`.
        self.student_request = Request()
        self.teacher_request = Request()

    @property
    def weight(self) -> float:
        """Factor of the loss in the total at the current progress."""
        return value_at(self._weight, self._progress)

    @property
    def constant_weight(self) -> float | None:
        """The weight where it is a number, None where it follows the progress."""
        return None if callable(self._weight) else float(self._weight)

    def set_progress(self, progress: float) -> None:
        """Say how much of the training is done, which schedules depend on.

        Args:
            progress: In [0, 1].
        """
        self._progress = progress

    def bind(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Fit the objective to a pair of models: choose layers, make projections. Called once, before training.

        Args:
            student: What is known of the student.
            teacher: What is known of the teacher.

        Raises:
            ValueError: If the models cannot give what the objective reads.
        """

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Loss per item.

        Args:
            student: What the student's forward left behind.
            teacher: What the teacher's forward left behind.

        Returns:
            The values and which of them count.
        """
        raise NotImplementedError

    def count(self, student: Signals, teacher: Signals) -> Tensor | None:
        """How many items of a batch :meth:`forward` will count, as far as its labels and masks tell.

        What ``accumulate_grad_batches`` needs of batches that are still to come.

        Args:
            student: What the batch says before the student runs: logits of width 0, and no layer.
            teacher: Likewise of the teacher.

        Returns:
            A scalar; None where only :meth:`forward` can tell.
        """
        if not self.reads_logits:
            return None
        every = torch.tensor(student.logits.shape[:-1].numel(), device=student.logits.device)
        return every if student.mask is None else student.mask.sum()

    @property
    def counts_ahead(self) -> bool:
        """Whether :meth:`count` is known to agree with :meth:`forward`: a class of one's own says so by having both."""
        kind = self._latest("count")
        return "count" in vars(kind) or kind.__module__.startswith("lightning_distill.")

    def chunked_term(self) -> Term | None:
        """The loss of a chunk of tokens, which spares a language model the logits of a whole batch.

        Over a large vocabulary it takes the place of :meth:`forward`, and means the same: the mean of its values over
        the tokens that count.

        Returns:
            See :data:`lightning_distill.functional.terms.Term`, at the current progress; None where whole logits are
            needed, as here.
        """
        return None

    @property
    def can_be_chunked(self) -> bool:
        """Whether :meth:`chunked_term` stands for :meth:`forward`: a class with another forward has to have both."""
        return "chunked_term" in vars(self._latest("chunked_term")) and self.chunked_term() is not None

    @property
    def top_k_temperatures(self) -> tuple[float, ...] | None:
        """Temperatures at which it can do with a teacher's k best classes, ``Signals.top_k``; None: with all alone."""
        return None

    def _latest(self, method: str) -> type:
        """The class that was last to say what the loss is, or what one of its methods is."""
        what = {"forward", "compare", "compare_rows", method}
        return next(kind for kind in type(self).__mro__ if what & vars(kind).keys())

    def extra_repr(self) -> str:
        """Weight and name, for ``print``."""
        return f"weight={self.weight}, name={self.name!r}"

    def _check_scheduled(
        self, argument: str, scheduled: Scheduled, expected: str, allowed: Callable[[float], bool]
    ) -> None:
        for tenth in range(11 if callable(scheduled) else 1):
            value = value_at(scheduled, tenth / 10)
            if not (math.isfinite(value) and allowed(value)):
                where = f"{value} at progress {tenth / 10}" if callable(scheduled) else value
                raise self._error(argument, expected, where)

    def _error(self, argument: str, expected: str, got: object, advice: str = "") -> ValueError:
        what = f"Expected argument `{argument}` of objective `{self.name}` to be {expected}, but got {got!r}."
        return ValueError(f"{what} {advice}".strip())


def are_paths(layers: Any) -> bool:
    """Whether an argument ``layers`` holds pairs of module paths."""
    return not isinstance(layers, str | None) and any(
        not isinstance(pair, int) and isinstance(pair[0], str) for pair in layers
    )


def paired(objective: Objective, layers: Any, student: ModelInfo, teacher: ModelInfo) -> list[tuple[Any, Any]]:
    """Pairs ``(student, teacher)`` of layers, from 0, or of module paths.

    Args:
        objective: Whose argument ``layers`` it is.
        layers: Such pairs, or what :func:`lightning_distill.students.layer_map` takes.
        student: What is known of the student.
        teacher: What is known of the teacher.

    Raises:
        ValueError: If there is no such layer or module, or the pairs mix the tokens of an encoder with those of a
            decoder; for a path that does not exist the message lists the near ones.
    """
    if are_paths(layers):
        pairs = [tuple(pair) for pair in layers]
        _check_paths(objective, pairs, student, teacher)
        return pairs
    assert student.depth is not None
    assert teacher.depth is not None
    try:
        return layer_map(layers, student.depth, teacher.depth)
    except ValueError as error:
        raise ValueError(f"Objective `{objective.name}`: {error}") from None


def _check_paths(objective: Objective, pairs: list[Any], student: ModelInfo, teacher: ModelInfo) -> None:
    for role, info, paths in (
        ("student", student, [pair[0] for pair in pairs]),
        ("teacher", teacher, [pair[1] for pair in pairs]),
    ):
        for path in paths:
            if path not in info.modules:
                raise ValueError(
                    f"Expected argument `layers` of objective `{objective.name}` to name modules of the {role}, but "
                    f"got {path!r}{near(path, info.modules)}"
                )
    stacks = {
        is_within(path, info.decoder) for pair in pairs for path, info in zip(pair, (student, teacher), strict=True)
    }
    if len(stacks) > 1:
        raise ValueError(
            f"Expected argument `layers` of objective `{objective.name}` to name modules of the encoders or of the "
            f"decoders, but got both: {pairs}. They read other tokens; give each its own objective."
        )


def named(objectives: Sequence[Objective] | Mapping[str, Objective]) -> dict[str, Objective]:
    """Objectives by the name they are logged as.

    Args:
        objectives: A list, or a dictionary that names them.

    Raises:
        TypeError: If it is something else.
        ValueError: If there is none, two have one name, or all have weight 0.
    """
    given: Any = objectives.values() if isinstance(objectives, Mapping) else objectives
    if not isinstance(objectives, (Mapping, Sequence)) or not all(isinstance(each, Objective) for each in given):
        raise TypeError(
            f"Expected argument `objectives` to be a list or a dictionary of objectives, but got {objectives!r}."
        )
    if any(type(each) is Objective for each in given):
        raise TypeError(
            "Expected argument `objectives` to hold objectives such as `SoftTarget`, but got `Objective` itself, which "
            "computes nothing."
        )
    if not objectives:
        raise ValueError("Expected argument `objectives` to have at least one objective, but got none.")
    constant = [objective.constant_weight for objective in given]
    if not any(weight is None or weight > 0 for weight in constant):
        raise ValueError(f"Expected argument `objectives` to have a weight above 0, but got the weights {constant}.")
    if isinstance(objectives, Mapping):
        return dict(objectives)
    names = [objective.name for objective in objectives]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Expected argument `objectives` to have different names, but got {twice[0]!r} twice. Pass `name=...` to "
            "one of them, or a dictionary."
        )
    return dict(zip(names, objectives, strict=True))
