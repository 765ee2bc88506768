"""Objectives on the models' predictions."""

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_distill import functional
from lightning_distill.arguments import typed
from lightning_distill.functional.divergences import Divergence
from lightning_distill.functional.hard_label import has_label
from lightning_distill.functional.tensors import full_precision
from lightning_distill.functional.terms import CosineTerm, HardLabelTerm, SoftTargetTerm, StandardizedTerm, Term
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.objectives.schedule import Scheduled, value_at
from lightning_distill.signals.signals import Signals


class Softened(Objective):
    """An objective with a temperature."""

    def __init__(self, temperature: Scheduled, weight: Scheduled, name: str | None) -> None:
        super().__init__(weight, name)
        self._check_scheduled("temperature", temperature, "finite and above 0", lambda value: value > 0)
        self._temperature = temperature

    @property
    def temperature(self) -> float:
        """Divisor of the logits at the current progress."""
        return value_at(self._temperature, self._progress)

    def extra_repr(self) -> str:
        """Weight, name and temperature, for ``print``."""
        return f"{super().extra_repr()}, temperature={self.temperature}"


@typed
class SoftTarget(Softened):
    """The teacher's softened prediction, see :func:`lightning_distill.functional.soft_target`.

    The loss is scaled by the squared temperature. In regression it is the squared difference of the logits instead, of
    embeddings one minus their cosine; temperature and divergence then mean nothing.

    Args:
        temperature: Divides the logits, finite and above 0; a number or a schedule.
        divergence: ``"forward_kl"``, ``"reverse_kl"``, ``"jeffreys"``, ``"js"``, ``"skew_forward_kl"``,
            ``"skew_reverse_kl"``, ``"total_variation"``, ``"alpha_beta"`` or ``"adaptive_kl"``.
        beta: Of ``"js"`` and ``"alpha_beta"``, in [0, 1]; None: as published.
        alpha: Of the skewed divergences, ``"alpha_beta"`` and ``"adaptive_kl"``, in (0, 1); None: as published.
        standardize: Whether z-scores of the logits take their place, so that their size does not matter; of at least 3
            classes, see :func:`lightning_distill.functional.standardize`.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import SoftTarget
        >>> from lightning_distill.signals.signals import Signals
        >>> student, teacher = Signals(torch.tensor([[0.0, 0.0]])), Signals(torch.tensor([[2.0, 0.0]]))
        >>> round(SoftTarget(temperature=2.0)(student, teacher).mean().item(), 4)
        0.4438
    """

    def __init__(
        self,
        temperature: Scheduled = 2.0,
        divergence: Divergence = "forward_kl",
        *,
        beta: float | None = None,
        alpha: float | None = None,
        standardize: bool = False,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(temperature, weight, name)
        if divergence not in get_args(Divergence):
            raise self._error("divergence", f"one of {get_args(Divergence)}", divergence)
        if beta is not None and not 0 <= beta <= 1:
            raise self._error("beta", "in [0, 1]", beta)
        if alpha is not None and not 0 < alpha < 1:
            raise self._error("alpha", "in (0, 1)", alpha)
        self.divergence, self.beta, self.alpha, self.standardize = divergence, beta, alpha, standardize

    def chunked_term(self) -> Term:
        """The divergence of a chunk of tokens."""
        term = SoftTargetTerm(self.temperature, self.divergence, self.beta, self.alpha)
        return StandardizedTerm(term) if self.standardize else term

    @property
    def top_k_temperatures(self) -> tuple[float, ...] | None:
        """Its own, where it is the forward KL and its temperature stays: the mass of other classes is kept for one."""
        able = self.divergence == "forward_kl" and not self.standardize and not callable(self._temperature)
        return (self.temperature,) if able else None

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Divergence per row, or per token."""
        options: Any = {"temperature": self.temperature, "mask": student.mask, "reduction": "none"}
        if self.standardize and (teacher.top_k or _are_values(student)):
            instead = "a teacher's k best classes alone" if teacher.top_k else "logits that are values and no classes"
            raise self._error("standardize", f"False with {instead}", True)
        if teacher.top_k:
            if self.divergence != "forward_kl":
                raise self._error("divergence", "'forward_kl' with a teacher's k best classes alone", self.divergence)
            if (best := teacher.top_k.get(self.temperature)) is None:
                kept = f"one that the teacher's k best classes were kept for, {tuple(teacher.top_k)}"
                advice = "A callback that adds objectives, such as `EarlyExit`, stands before `TeacherCache`."
                raise self._error("temperature", kept, self.temperature, advice)
            values = functional.top_k_soft_target(student.logits, best.log_probs, best.classes, **options)
        elif student.vectors:
            values = functional.logits_cosine(student.logits, teacher.logits, mask=student.mask, reduction="none")
        elif _are_values(student):
            values = functional.logits_mse(student.logits, teacher.logits, mask=student.mask, reduction="none")
        else:
            options |= {"divergence": self.divergence, "beta": self.beta, "alpha": self.alpha}
            options["standardize"] = self.standardize
            values = functional.soft_target(student.logits, teacher.logits, **options)
        return Loss(values, student.mask)


@typed
class TopKSoftTarget(Softened):
    """The teacher's k best classes and its tail's mass, see :func:`lightning_distill.functional.top_k_soft_target`.

    The loss is scaled by the squared temperature.

    Args:
        k: Number of classes kept of each prediction, at least 1 (all of them where there are fewer).
        temperature: Divides the logits, finite and above 0; a number or a schedule.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import TopKSoftTarget
        >>> from lightning_distill.signals.signals import Signals
        >>> student, teacher = Signals(torch.zeros(1, 4)), Signals(torch.tensor([[2.0, 1.0, 0.0, 0.0]]))
        >>> round(TopKSoftTarget(2, temperature=1.0)(student, teacher).mean().item(), 4)
        0.3376
    """

    needs_classes = True

    def __init__(
        self, k: int = 16, temperature: Scheduled = 1.0, *, weight: Scheduled = 1.0, name: str | None = None
    ) -> None:
        super().__init__(temperature, weight, name)
        if k < 1:
            raise self._error("k", "at least 1", k)
        self.k = k

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Divergence per row, or per token."""
        log_probs = torch.log_softmax(full_precision(teacher.logits) / self.temperature, dim=-1)
        top, classes = log_probs.topk(min(self.k, log_probs.shape[-1]), dim=-1)
        values = functional.top_k_soft_target(
            student.logits, top, classes, temperature=self.temperature, mask=student.mask, reduction="none"
        )
        return Loss(values, student.mask)


class LogitsMSE(Objective):
    """Mean squared difference of the logits, see :func:`lightning_distill.functional.logits_mse`.

    Args:
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import LogitsMSE
        >>> from lightning_distill.signals.signals import Signals
        >>> LogitsMSE()(Signals(torch.zeros(1, 2)), Signals(torch.ones(1, 2))).mean().item()
        1.0
    """

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Mean squared difference per row, or per token."""
        values = functional.logits_mse(student.logits, teacher.logits, mask=student.mask, reduction="none")
        return Loss(values, student.mask)


class LogitsCosine(Objective):
    """One minus the cosine of the logits, see :func:`lightning_distill.functional.logits_cosine`.

    Over a large vocabulary it is computed chunk by chunk, as :class:`SoftTarget` is.

    Args:
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import LogitsCosine
        >>> from lightning_distill.signals.signals import Signals
        >>> LogitsCosine()(Signals(torch.tensor([[1.0, 0.0]])), Signals(torch.tensor([[0.0, 1.0]]))).mean().item()
        1.0
    """

    needs_classes = True

    def chunked_term(self) -> CosineTerm:
        """The distance of a chunk of tokens."""
        return CosineTerm()

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """One minus the cosine per row, or per token."""
        values = functional.logits_cosine(student.logits, teacher.logits, mask=student.mask, reduction="none")
        return Loss(values, student.mask)


@typed
class HardLabel(Objective):
    """The labels of the data: cross entropy with classes or their probabilities; in regression the squared error.

    With embeddings of pairs it is the squared difference of their cosine and their score.

    Args:
        label_smoothing: Share of the label that is spread evenly over the classes, in [0, 1).
        class_weights: Factor of the loss of each class, at least 0. The mean is divided by the sum of the weights of
            the labels, as by :class:`torch.nn.CrossEntropyLoss`; labels that are probabilities count 1 each, as there.
        pos_weight: Factor of the loss where a label is there, above 0, as in :class:`torch.nn.BCEWithLogitsLoss`: one a
            label where a row has several (``task="multi_label"``), or one number for all; with two classes, for class
            1. The mean is over labels, whatever they weigh.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If an argument is out of its range, or a batch has no labels, or the weights are not as many as the
            classes or labels.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import HardLabel
        >>> from lightning_distill.signals.signals import Signals
        >>> student = Signals(torch.zeros(3, 2), labels=torch.tensor([0, 1, -100]))
        >>> loss = HardLabel()(student, student)
        >>> loss.count().item(), round(loss.mean().item(), 4)
        (2, 0.6931)
    """

    needs_teacher, needs_labels = False, True

    def __init__(
        self,
        label_smoothing: float = 0.0,
        *,
        class_weights: Sequence[float] | None = None,
        pos_weight: float | Sequence[float] | None = None,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if not 0 <= label_smoothing < 1:
            raise self._error("label_smoothing", "in [0, 1)", label_smoothing)
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else [float(each) for each in class_weights]
        if self.class_weights is not None and not (
            all(math.isfinite(each) and each >= 0 for each in self.class_weights) and any(self.class_weights)
        ):
            raise self._error("class_weights", "finite and at least 0, one of them above 0", class_weights)
        self.pos_weight: float | list[float] | None = None
        if pos_weight is not None:
            weights = torch.as_tensor(pos_weight, dtype=torch.float32)
            if class_weights is not None or not bool((weights.isfinite() & (weights > 0)).all()):
                raise self._error("pos_weight", "finite and above 0, and without `class_weights`", pos_weight)
            self.pos_weight = weights.tolist()

    @property
    def needs_classes(self) -> bool:  # type: ignore[override]
        """Whether classes have weights."""
        return self.class_weights is not None

    def count(self, student: Signals, teacher: Signals) -> Tensor | None:
        """Rows, or tokens, that have a label; with ``class_weights`` the sum of the weights of their labels."""
        if student.vectors and student.labels is not None:
            return Loss(student.labels, candidate_mask(student)).count()
        if self.class_weights is None or student.labels is None or student.labels.is_floating_point():
            return count_labelled(self, student)
        labels, mask = labelled(self, student)
        return Loss(labels, mask, self._counts(labels)).count()

    def chunked_term(self) -> HardLabelTerm | None:
        """The cross entropy of a chunk of tokens, where all classes weigh the same."""
        weighs = self.class_weights is not None or self.pos_weight is not None
        return None if weighs else HardLabelTerm(self.label_smoothing)

    def _counts(self, labels: Tensor) -> Tensor:
        """The weight of each label that is a class; of others, which count nothing, that of class 0."""
        weights = torch.tensor(self.class_weights, device=labels.device)
        return weights[labels.long().clamp(0, len(weights) - 1)]

    def _pos_weight(self, logits: Tensor) -> Tensor:
        """The weight of each label, or the one of all."""
        weight = torch.tensor(self.pos_weight, device=logits.device)
        labels = logits.shape[-2] if logits.ndim > 2 else 1
        if logits.shape[-1] != 2 or (weight.ndim and len(weight) != labels):
            expected = f"a number or {labels} of them, one a label, beside labels that are there or not"
            raise self._error("pos_weight", expected, self.pos_weight)
        return weight if labels > 1 else weight.reshape(())

    def forward(self, student: Signals, teacher: Signals | None = None) -> Loss:
        """Loss per row, or per token."""
        labels, mask = labelled(self, student)
        if student.vectors:
            cosines = functional.candidate_scores(student.logits, mask=student.mask)
            return Loss((cosines - labels.to(cosines)).square(), candidate_mask(student))
        if _are_values(student):
            for name in ("class_weights", "pos_weight"):
                if (weights := getattr(self, name)) is not None:
                    raise self._error(name, "None where logits are values and no classes", weights)
            return Loss(functional.logits_mse(student.logits, labels.view_as(student.logits), reduction="none"), mask)
        weights = None if self.class_weights is None else torch.tensor(self.class_weights, device=labels.device)
        if weights is not None and len(weights) != student.logits.shape[-1]:
            raise self._error("class_weights", f"{student.logits.shape[-1]} weights, one a class", self.class_weights)
        of_labels = None if self.pos_weight is None else self._pos_weight(student.logits)
        values = functional.hard_label(
            student.logits,
            labels,
            label_smoothing=self.label_smoothing,
            class_weights=weights,
            pos_weight=of_labels,
            mask=mask,
            reduction="none",
        )
        return Loss(values, mask, None if weights is None or labels.is_floating_point() else self._counts(labels))


def candidate_mask(signals: Signals) -> Tensor | None:
    """Bool ``[B, S - 1]``, where the first text of a row and another one are there; None where all are."""
    return None if signals.mask is None else signals.mask[:, :1] & signals.mask[:, 1:]


def _are_values(student: Signals) -> bool:
    """Whether the logits are real values, as in regression, and no classes."""
    return student.regression or student.logits.shape[-1] == 1


def labelled(objective: Objective, student: Signals) -> tuple[Tensor, Tensor | None]:
    """The labels, and the mask of the items that count and have one."""
    labels, mask = require_labels(objective, student), student.mask
    if not _are_values(student) and not student.vectors:
        labelled = has_label(labels, soft=labels.is_floating_point() and labels.shape == student.logits.shape)
        mask = labelled if mask is None else mask & labelled
    return labels, mask


def count_labelled(objective: Objective, student: Signals) -> Tensor:
    """How many items count and have a label, a scalar."""
    if student.labels is None:
        return torch.tensor(0, device=student.logits.device)
    mask = labelled(objective, student)[1]
    return torch.tensor(student.logits.shape[:-1].numel(), device=student.logits.device) if mask is None else mask.sum()


def require_labels(objective: Objective, student: Signals) -> Tensor:
    """The labels of a batch, for an objective that cannot do without."""
    if student.labels is None:
        raise ValueError(f"Expected objective `{objective.name}` to be given labels, but got a batch without them.")
    return student.labels
