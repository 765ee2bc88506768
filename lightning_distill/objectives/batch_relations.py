"""Objectives on how the rows of a batch relate to each other.

The value of a row depends on the other rows of its batch, so these objectives change with the batch size, and with
how a batch is split into micro-batches or over ranks.
"""

from typing import ClassVar, Literal, get_args

from torch import Tensor

from lightning_distill import functional
from lightning_distill.arguments import typed
from lightning_distill.objectives.features import FeatureLayers, FeatureObjective, Widths, pool
from lightning_distill.objectives.schedule import Scheduled

Pooling = Literal["mean", "first", "flatten"]


@typed
class _Rows(FeatureObjective):
    """Compares one vector per row; widths may differ, and no projection is made."""

    shared_dims: ClassVar[int | None] = 1
    per_row = True

    def __init__(
        self,
        layers: FeatureLayers = "uniform",
        *,
        pooling: Pooling = "mean",
        embedding: bool = False,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, embedding=embedding, weight=weight, name=name)
        if pooling not in get_args(Pooling):
            raise self._error("pooling", f"one of {get_args(Pooling)}", pooling)
        self.pooling = pooling

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Values per row."""
        rows = mask if mask is None or mask.ndim == 1 else mask.any(1)
        return self.compare_rows(pool(student, mask, self.pooling), pool(teacher, mask, self.pooling), rows)

    def compare_rows(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Values ``[B]`` of features ``[B, D_s]`` and ``[B, D_t]``."""
        raise NotImplementedError


class SimilarityPreserving(_Rows):
    """Which rows are alike (SP), see :func:`lightning_distill.functional.similarity_preserving`.

    A row's value depends on its batch. Widths may differ; there is no projection.

    Args:
        layers: As in :class:`HiddenState`.
        pooling: What stands for a row of tokens or positions: their ``"mean"``, the ``"first"`` of them, or all
            of them in one vector, ``"flatten"``.
        embedding: Whether the input of the first layers is a pair too.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import SimilarityPreserving
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = SimilarityPreserving([("0", "0")])
        >>> objective.bind(ModelInfo(modules={"0": 1}), ModelInfo(modules={"0": 2}))
        >>> student = Signals(torch.zeros(2, 2), modules={"0": torch.tensor([[1.0], [1.0]])})
        >>> teacher = Signals(torch.zeros(2, 2), modules={"0": torch.eye(2)})
        >>> round(objective(student, teacher).mean().item(), 4)
        0.2929
    """

    def __init__(
        self,
        layers: FeatureLayers = "uniform",
        *,
        pooling: Pooling = "flatten",
        embedding: bool = False,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, pooling=pooling, embedding=embedding, weight=weight, name=name)

    def compare_rows(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Squared difference of similarities."""
        return functional.similarity_preserving(student, teacher, mask=mask, reduction="none")


class RelationalDistance(_Rows):
    """How far rows are from each other (RKD), see :func:`lightning_distill.functional.relational_distance`.

    A row's value depends on its batch. Widths may differ; there is no projection.

    Arguments are those of :class:`SimilarityPreserving`, with ``pooling="mean"`` as the default.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import RelationalDistance
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = RelationalDistance([("0", "0")])
        >>> objective.bind(ModelInfo(modules={"0": 1}), ModelInfo(modules={"0": 1}))
        >>> student = Signals(torch.zeros(3, 2), modules={"0": torch.tensor([[0.0], [1.0], [2.0]])})
        >>> teacher = Signals(torch.zeros(3, 2), modules={"0": torch.tensor([[0.0], [1.0], [5.0]])})
        >>> round(objective(student, teacher).mean().item(), 4)
        0.045
    """

    def compare_rows(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Huber difference of distances."""
        return functional.relational_distance(student, teacher, mask=mask, reduction="none")


class RelationalAngle(_Rows):
    """The angles that three rows form (RKD), see :func:`lightning_distill.functional.relational_angle`.

    A row's value depends on its batch. Widths may differ; there is no projection.

    Arguments are those of :class:`SimilarityPreserving`, with ``pooling="mean"`` as the default.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import RelationalAngle
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = RelationalAngle([("0", "0")])
        >>> objective.bind(ModelInfo(modules={"0": 2}), ModelInfo(modules={"0": 2}))
        >>> student = Signals(torch.zeros(3, 2), modules={"0": torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])})
        >>> teacher = Signals(torch.zeros(3, 2), modules={"0": torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])})
        >>> round(objective(student, teacher).mean().item(), 4)
        0.1296
    """

    def compare_rows(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Huber difference of cosines."""
        return functional.relational_angle(student, teacher, mask=mask, reduction="none")


@typed
class Contrastive(_Rows):
    """Finding the teacher's row of the same input, see :func:`lightning_distill.functional.contrastive`.

    A row's value depends on its batch, whose other rows are the negatives. It is not 0 where student equals teacher.

    Args:
        layers: As in :class:`HiddenState`.
        pooling: What stands for a row of tokens or positions: their ``"mean"``, the ``"first"`` of them, or all
            of them in one vector, ``"flatten"``.
        temperature: Divides the cosines, finite and above 0.
        embedding: Whether the input of the first layers is a pair too.
        projection: Whether student features go through a learned linear layer; None: where the widths differ.
        widths: Widths ``(student, teacher)``, where they cannot be read off the models; or a list of them, one for each
            pair of layers.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import Contrastive
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = Contrastive([("0", "0")], temperature=1.0)
        >>> objective.bind(ModelInfo(modules={"0": 3}), ModelInfo(modules={"0": 3}))
        >>> signals = Signals(torch.zeros(3, 2), modules={"0": torch.eye(3)})
        >>> round(objective(signals, signals).mean().item(), 4)
        0.5514
    """

    shared_dims = None

    def __init__(
        self,
        layers: FeatureLayers = "uniform",
        *,
        pooling: Pooling = "mean",
        temperature: float = 0.1,
        embedding: bool = False,
        projection: bool | None = None,
        widths: Widths = None,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, pooling=pooling, embedding=embedding, weight=weight, name=name)
        if not 0 < temperature < float("inf"):
            raise self._error("temperature", "finite and above 0", temperature)
        self.temperature, self.projection, self.widths = temperature, projection, widths

    def compare_rows(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Cross entropy of the match."""
        return functional.contrastive(student, teacher, temperature=self.temperature, mask=mask, reduction="none")
