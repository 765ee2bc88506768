"""Objectives on embeddings, and on the scores of a query's candidates.

Where a row of a batch has several texts, its embeddings are ``[B, S, D]``, and its first text is the query, or one side
of a pair. A reranker gives the scores ``[B, C]`` of C candidates as its logits.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_distill import functional
from lightning_distill.arguments import typed
from lightning_distill.functional.embeddings import Similarity
from lightning_distill.objectives.logits import candidate_mask, require_labels
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.objectives.schedule import Scheduled
from lightning_distill.signals.description import ModelInfo
from lightning_distill.signals.signals import Signals


@typed
class EmbeddingDistance(Objective):
    """How far the student's embedding of each text is from the teacher's.

    Args:
        distance: ``"cosine"``, one minus the cosine, or ``"mse"``, the mean squared difference; see
            :func:`lightning_distill.functional.logits_cosine` and ``logits_mse``.
        projection: Whether the student's embedding is mapped to the teacher's width by a linear layer, which is learned
            beside the student and left out of its export; None: where the widths differ.
        widths: Widths ``(student, teacher)``, where they cannot be read off the models.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If an argument is out of its range, widths differ without a projection, or one is needed and a width
            is not known.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import EmbeddingDistance
        >>> from lightning_distill.signals.signals import Signals
        >>> student, teacher = Signals(torch.tensor([[1.0, 0.0]])), Signals(torch.tensor([[0.0, 3.0]]))
        >>> EmbeddingDistance("cosine")(student, teacher).mean().item()
        1.0

    Source: Reimers and Gurevych, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
    2020 (mse); Kim et al., "EmbedDistill", 2023 (with a projection).
    """

    any_width = True

    def __init__(
        self,
        distance: Literal["cosine", "mse"] = "cosine",
        *,
        projection: bool | None = None,
        widths: tuple[int, int] | None = None,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if distance not in ("cosine", "mse"):
            raise self._error("distance", "'cosine' or 'mse'", distance)
        self.distance, self.projection, self.widths = distance, projection, widths
        self.project: nn.Module = nn.Identity()

    def bind(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Make a projection where it is needed."""
        ours, theirs = self.widths or (student.embedding_width, teacher.embedding_width)
        differ = None not in (ours, theirs) and ours != theirs
        if differ and self.projection is False:
            widths = f"the embeddings of the student have the width {ours} and those of the teacher {theirs}"
            raise self._error("projection", f"left out or True, as {widths}", False)
        if not differ and not self.projection:
            return
        if ours is None or theirs is None:
            raise self._error("widths", "given, as the widths to project between are unknown", self.widths)
        self.project = nn.Linear(ours, theirs)

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Distance per text."""
        embeddings = self.project(student.logits)
        if embeddings.shape[-1] != teacher.logits.shape[-1]:
            widths = (student.logits.shape[-1], teacher.logits.shape[-1])
            raise self._error("widths", f"{widths}, those of the embeddings", self.widths, "Pass them.")
        distance = functional.logits_cosine if self.distance == "cosine" else functional.logits_mse
        return Loss(distance(embeddings, teacher.logits, mask=student.mask, reduction="none"), student.mask)


class EmbeddingSimilarity(Objective):
    """How alike the texts of a batch are, see :func:`lightning_distill.functional.embedding_similarity`.

    The value of a text depends on its batch, all texts of which it is compared with. Widths may differ; there is no
    projection.

    Args:
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import EmbeddingSimilarity
        >>> from lightning_distill.signals.signals import Signals
        >>> EmbeddingSimilarity()(Signals(torch.tensor([[1.0], [2.0]])), Signals(torch.eye(2))).mean().item()
        0.5
    """

    any_width = True

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Squared difference of cosines per text."""
        values = functional.embedding_similarity(student.logits, teacher.logits, mask=student.mask, reduction="none")
        return Loss(values, student.mask)


class _Candidates(Objective):
    """Compares the scores of a query's candidates, which either model gives in its own way."""

    any_width = True

    def __init__(self, similarity: Similarity, of_labels: bool, weight: Scheduled, name: str | None) -> None:
        super().__init__(weight, name)
        if similarity not in get_args(Similarity):
            raise self._error("similarity", f"one of {get_args(Similarity)}", similarity)
        self.similarity, self.of_labels = similarity, of_labels
        self.needs_teacher, self.needs_labels = not of_labels, of_labels

    def _scores(self, student: Signals, teacher: Signals | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores ``[B, C]`` of both, and which candidates are there."""
        mask = candidate_mask(student) if student.logits.ndim == 3 else student.mask
        ours = self._of(student)
        theirs = require_labels(self, student) if teacher is None or self.of_labels else self._of(teacher)
        if theirs.shape != ours.shape or ours.shape[1] < 2:
            raise ValueError(
                f"Expected objective `{self.name}` to get scores of the same two candidates or more of each query, but "
                f"got {list(ours.shape)} of the student and {list(theirs.shape)} of the "
                f"{'labels' if self.of_labels else 'teacher'}. Give rows of a query and its candidates, `input_ids` "
                "[rows, 1 + candidates, tokens]."
            )
        return ours, theirs.to(ours), mask

    def _of(self, signals: Signals) -> Tensor:
        if signals.logits.ndim < 3:
            return signals.logits
        return functional.candidate_scores(signals.logits, self.similarity, mask=signals.mask)

    def count(self, student: Signals, teacher: Signals) -> Tensor | None:
        """Only :meth:`forward` can tell, but where a mask says which texts there are."""
        if self.of_labels and student.labels is None:
            return torch.tensor(0, device=student.logits.device)
        if student.mask is None or student.logits.ndim != 3:
            return None
        there = candidate_mask(student)
        assert there is not None
        return self._counted(there).sum()

    def _counted(self, mask: Tensor) -> Tensor:
        """What counts, where these candidates are there."""
        raise NotImplementedError


@typed
class MarginMSE(_Candidates):
    """The lead of a query's first candidate over each other one, see :func:`lightning_distill.functional.margin_mse`.

    A row is a query, its positive candidate and one negative or more. Embeddings are scored by their similarity; where
    logits are ``[B, C]``, as a reranker's, they are the scores.

    Args:
        similarity: Of embeddings: ``"dot"`` as in the paper, or ``"cosine"``.
        of_labels: Whether the labels ``[B, C]`` are the scores to learn, such as a cross-encoder's that were computed
            before; then there need be no teacher.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If there is no such similarity, or a batch has no such rows.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import MarginMSE
        >>> from lightning_distill.signals.signals import Signals
        >>> MarginMSE()(Signals(torch.tensor([[0.5, 0.5]])), Signals(torch.tensor([[9.0, 8.0]]))).mean().item()
        1.0
    """

    def __init__(
        self,
        similarity: Similarity = "dot",
        *,
        of_labels: bool = False,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(similarity, of_labels, weight, name)

    def forward(self, student: Signals, teacher: Signals | None = None) -> Loss:
        """Squared difference per margin."""
        ours, theirs, mask = self._scores(student, teacher)
        values = functional.margin_mse(ours, theirs, mask=mask, reduction="none")
        return Loss(values, None if mask is None else self._counted(mask))

    def _counted(self, mask: Tensor) -> Tensor:
        return mask[:, :1] & mask[:, 1:]


@typed
class ListwiseKL(_Candidates):
    """Which of a query's candidates are likely, see :func:`lightning_distill.functional.listwise_kl`.

    A row is a query and two candidates or more, in any order. Embeddings are scored by their similarity; where logits
    are ``[B, C]``, as a reranker's, they are the scores.

    Args:
        similarity: Of embeddings: ``"dot"`` or ``"cosine"``; cosines want a temperature far below 1.
        temperature: Divides the scores of both, finite and above 0; the loss is scaled by its square.
        of_labels: Whether the labels ``[B, C]`` are the scores to learn; then there need be no teacher.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If an argument is out of its range, or a batch has no such rows.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import ListwiseKL
        >>> from lightning_distill.signals.signals import Signals
        >>> student, teacher = Signals(torch.zeros(1, 2)), Signals(torch.tensor([[2.0, 0.0]]))
        >>> round(ListwiseKL()(student, teacher).mean().item(), 4)
        0.3278
    """

    def __init__(
        self,
        similarity: Similarity = "dot",
        *,
        temperature: float = 1.0,
        of_labels: bool = False,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(similarity, of_labels, weight, name)
        if not 0 < temperature < float("inf"):
            raise self._error("temperature", "finite and above 0", temperature)
        self.temperature = temperature

    def forward(self, student: Signals, teacher: Signals | None = None) -> Loss:
        """Divergence per row."""
        ours, theirs, mask = self._scores(student, teacher)
        values = functional.listwise_kl(ours, theirs, temperature=self.temperature, mask=mask, reduction="none")
        return Loss(values, None if mask is None else self._counted(mask))

    def _counted(self, mask: Tensor) -> Tensor:
        return mask.sum(1) > 1


@typed
class CoSENT(Objective):
    """The order of the cosines of pairs, as their labels have it, see :func:`lightning_distill.functional.cosent`.

    An objective on labels, in place of :class:`HardLabel`, which asks for the cosines themselves. It has one value for
    a batch, which depends on all of its pairs.

    Args:
        scale: Multiplies the cosines, finite and above 0.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If the scale is out of its range, or a batch has no labels.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import CoSENT
        >>> from lightning_distill.signals.signals import Signals
        >>> student = Signals(torch.ones(2, 2, 3), torch.tensor([[0.0], [1.0]]))
        >>> round(CoSENT()(student).mean().item(), 4)
        0.6931
    """

    needs_teacher, needs_labels = False, True

    def __init__(self, scale: float = 20.0, *, weight: Scheduled = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name or "cosent")
        if not 0 < scale < float("inf"):
            raise self._error("scale", "finite and above 0", scale)
        self.scale = scale

    def forward(self, student: Signals, teacher: Signals | None = None) -> Loss:
        """The value of the batch, for each of its pairs."""
        labels, mask = require_labels(self, student), candidate_mask(student)
        cosines = functional.candidate_scores(student.logits, mask=student.mask)
        value = functional.cosent(cosines, labels, scale=self.scale, mask=mask)
        return Loss(value.expand(labels.shape), mask)

    def count(self, student: Signals, teacher: Signals) -> Tensor | None:
        """Pairs that have a label."""
        if student.labels is None:
            return torch.tensor(0, device=student.logits.device)
        return Loss(student.labels, candidate_mask(student)).count()
