"""Losses over a large vocabulary, a chunk of tokens at a time: each with its gradient, and no graph behind it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_distill.functional.divergences import (
    Divergence,
    WithGradient,
    at_logits,
    check_divergence,
    check_temperature,
    cosine_distance,
    divergence_of,
    log_probabilities,
    top_k_kl,
)
from lightning_distill.functional.projection import TopK
from lightning_distill.functional.standardize import deviation, standardize
from lightning_distill.functional.tensors import full_precision


@dataclass
class Chunk:
    """Some tokens of a batch, and all of their logits.

    Args:
        logits: The student's, shape ``[N, V]``, float32 or float64.
        teacher: The teacher's logits ``[N, V]``; its k best words by temperature, where only these were kept; None
            where no teacher ran.
        labels: Integer ``[N]``, or None where no term reads them.
    """

    logits: Tensor
    teacher: Tensor | Mapping[float, TopK] | None = None
    labels: Tensor | None = None
    _known: list[tuple[float, Tensor]] = field(default_factory=list)

    def take(self, tokens: slice) -> "Chunk":
        """Some of the tokens."""
        if isinstance(self.teacher, Mapping):
            teacher: Any = {temperature: best.take(tokens) for temperature, best in self.teacher.items()}
        else:
            teacher = None if self.teacher is None else self.teacher[tokens]
        return Chunk(self.logits[tokens], teacher, None if self.labels is None else self.labels[tokens])

    def log_probs(self, temperature: float) -> Tensor:
        """The student's log-probabilities ``[N, V]``, which terms of one temperature share; not to be written to."""
        for known, log_probs in self._known:
            if known == temperature:
                return log_probs
        self._known.append((temperature, log_probabilities(self.logits, temperature)))
        return self._known[-1][1]


#: Of a chunk, the value ``[N]`` of each token and a function that computes the gradient ``[N, V]`` of each value at the
#: student's logits. A frozen dataclass with a ``__call__`` is one that a compiler need not look at anew in each step.
Term: TypeAlias = Callable[[Chunk], WithGradient]


@dataclass(frozen=True)
class SoftTargetTerm:
    """:func:`lightning_distill.functional.soft_target`, or of k best words ``top_k_soft_target``, of a chunk.

    Args:
        temperature: Divides both logits, above 0.
        divergence: Its name; with k best words ``"forward_kl"`` alone.
        beta: As in :func:`lightning_distill.functional.soft_target`.
        alpha: Likewise.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill.functional.terms import Chunk, SoftTargetTerm
        >>> term = SoftTargetTerm(temperature=2.0)
        >>> values, gradient = term(Chunk(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])))
        >>> values, gradient()
        (tensor([0.4438]), tensor([[-0.4621,  0.4621]]))
    """

    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_divergence(self.divergence, self.beta, self.alpha)

    def __call__(self, chunk: Chunk) -> WithGradient:
        """Values and gradient."""
        temperature, log_q = self.temperature, chunk.log_probs(self.temperature)
        if isinstance(chunk.teacher, Tensor):
            log_p = log_probabilities(chunk.teacher, temperature)
            values, gradient = divergence_of(log_q, log_p, self.divergence, self.beta, self.alpha)
        elif chunk.teacher is not None and self.divergence == "forward_kl":
            best = chunk.teacher[temperature]
            values, gradient = top_k_kl(log_q, full_precision(best.log_probs), best.classes.long())
        else:
            raise ValueError(
                "Expected argument `divergence` to be 'forward_kl' with a teacher's k best words alone, but got "
                f"{self.divergence!r}."
            )
        return temperature**2 * values, lambda: temperature * at_logits(gradient(), log_q)


@dataclass(frozen=True)
class StandardizedTerm:
    """Another term, of z-scores in the place of logits, see :func:`lightning_distill.functional.standardize`.

    Args:
        term: Computed from the z-scores of both models.
    """

    term: Term

    def __call__(self, chunk: Chunk) -> WithGradient:
        """Values and gradient."""
        if not isinstance(chunk.teacher, Tensor):
            raise ValueError(
                "Expected argument `standardize` to be False with a teacher's k best words alone, but got True: the "
                "mean and deviation of the others are not known."
            )
        scores, size = standardize(chunk.logits), deviation(chunk.logits)
        values, gradient = self.term(Chunk(scores, standardize(chunk.teacher), chunk.labels))

        def at_logits() -> Tensor:
            g = gradient()
            along = (g * scores).sum(-1, keepdim=True) / (g.shape[-1] - 1)
            return (g - g.mean(-1, keepdim=True) - along * scores) / size

        return values, at_logits


@dataclass(frozen=True)
class CosineTerm:
    """:func:`lightning_distill.functional.logits_cosine` of a chunk."""

    def __call__(self, chunk: Chunk) -> WithGradient:
        """Values and gradient."""
        assert isinstance(chunk.teacher, Tensor)
        return cosine_distance(chunk.logits, chunk.teacher)


@dataclass(frozen=True)
class HardLabelTerm:
    """:func:`lightning_distill.functional.hard_label` of a chunk whose labels are words.

    Args:
        label_smoothing: Share of the label that is spread evenly over the words, in [0, 1).

    Raises:
        ValueError: If it is out of its range.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"Expected argument `label_smoothing` to be in [0, 1), but got {self.label_smoothing}.")

    def __call__(self, chunk: Chunk) -> WithGradient:
        """Values and gradient."""
        assert chunk.labels is not None
        log_q, label, smoothing = chunk.log_probs(1.0), chunk.labels[:, None], self.label_smoothing
        values = -(1 - smoothing) * log_q.gather(1, label)[:, 0]
        if smoothing:
            values = values - smoothing * log_q.mean(1)

        def gradient() -> Tensor:
            found = log_q.exp()
            found = found.sub_(smoothing / found.shape[1]) if smoothing else found
            return found.scatter_add_(1, label, torch.full_like(label, smoothing - 1, dtype=found.dtype))

        return values, gradient
