"""Objectives on hidden states and other features of the two models, layer by layer."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_distill import functional
from lightning_distill.arguments import typed
from lightning_distill.functional.tensors import full_precision
from lightning_distill.objectives.objective import Loss, Objective, are_paths, paired
from lightning_distill.objectives.schedule import Scheduled
from lightning_distill.signals.description import ModelInfo
from lightning_distill.signals.signals import Request, Signals

#: A named map, a teacher layer per student layer, or pairs (student, teacher) of layers or of module paths; None: none.
FeatureLayers = str | list[int] | list[tuple[int, int]] | list[tuple[str, str]] | None
#: Widths (student, teacher) of all pairs of layers, or of each of them; None: read off the models.
Widths = tuple[int, int] | list[tuple[int, int]] | None


@typed
class FeatureObjective(Objective):
    """Compares features of paired layers; subclasses define :meth:`compare`.

    The values of several pairs are averaged. Features are ``[B, T, D]`` or ``[B, D]``; a feature map ``[B, C, H, W]``
    is read as ``H * W`` tokens of width ``C``.

    Args:
        layers: A named map (see :func:`lightning_distill.students.layer_map`), a teacher layer per student layer,
            or pairs ``(student, teacher)`` of layers (from 0) or of module paths; None for the embedding alone.
        embedding: Whether the input of the first layers is a pair too.
        projection: Whether each student feature is mapped to the teacher's width by a learned linear layer; None:
            where the widths differ.
        widths: Widths ``(student, teacher)`` of the features, where they cannot be read off the models; a list of such
            pairs, one for each pair of layers (that of the embedding first), where they differ.
        pool_maps: Whether of two feature maps the larger is pooled to the height and width of the smaller (adaptive
            average pooling); otherwise maps of other sizes are refused.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If the models do not have these layers or modules, or a projection lacks a width.
    """

    reads_logits = False

    #: How many leading dimensions of a student's and a teacher's feature must agree; None: all, the width too.
    shared_dims: ClassVar[int | None] = None
    #: Whether :meth:`compare` gives a value per row where features have tokens.
    per_row: ClassVar[bool] = False

    def __init__(
        self,
        layers: FeatureLayers = "uniform",
        *,
        embedding: bool = False,
        projection: bool | None = None,
        widths: Widths = None,
        pool_maps: bool = False,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if layers is None and not embedding:
            raise self._error("layers", "given where `embedding` is False", None)
        self.layers, self.embedding, self.projection, self.widths = layers, embedding, projection, widths
        self.pool_maps = pool_maps
        #: Layers or module paths, ``(student, teacher)``; set by :meth:`bind`.
        self.pairs: list[tuple[Any, Any]] = []
        self.projections = nn.ModuleList()

    def bind(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Pair the layers, and make a projection per pair where it is needed."""
        infos = {"student": student, "teacher": teacher}
        if are_paths(self.layers):
            self.pairs = paired(self, self.layers, student, teacher)
            widths = [(student.modules[s], teacher.modules[t]) for s, t in self.pairs]
        else:
            for role, info in infos.items():
                if info.depth is None:
                    raise self._error(
                        "layers",
                        "pairs of module paths",
                        self.layers,
                        f"The {role} has no stack of equal layers; its modules are {list(info.modules)[:8]}..."
                        f"{'' if info.no_layers is None else f' {info.no_layers}'}",
                    )
            self.pairs = [] if self.layers is None else paired(self, self.layers, student, teacher)
            widths = [(student.width, teacher.width)] * len(self.pairs)
        widths = [(student.width, teacher.width)] * self.embedding + widths
        self.student_request, self.teacher_request = self._request(0), self._request(1)
        if self.shared_dims is None:
            self.projections = nn.ModuleList(self._projection(*pair) for pair in self._given_widths(widths))

    def _given_widths(self, known: list[tuple[int | None, int | None]]) -> list[Any]:
        given: Any = self.widths
        if given is None:
            return known
        if isinstance(given[0], int):
            return [given] * len(known)
        if len(given) != len(known):
            pairs = [("embedding", "embedding")] * self.embedding + self.pairs
            raise self._error("widths", f"a pair for each of the {len(known)} pairs {pairs}", given)
        return list(given)

    def _request(self, side: int) -> Request:
        ends = [pair[side] for pair in self.pairs]
        return Request(
            hidden_states=frozenset(end for end in ends if isinstance(end, int)),
            modules=frozenset(end for end in ends if isinstance(end, str)),
            embedding=self.embedding,
        )

    def _projection(self, student_width: int | None, teacher_width: int | None) -> nn.Module:
        unknown = student_width is None or teacher_width is None
        differ = not unknown and student_width != teacher_width
        if self.projection is False and differ:
            widths = f"the widths {student_width} of the student and {teacher_width} of the teacher differ"
            raise self._error("projection", f"left out or True, as {widths}", False)
        # A width that a module's class does not tell may well be equal: only a projection has to know it.
        if self.projection is False or not (self.projection or differ):
            return nn.Identity()
        if student_width is None or teacher_width is None:
            raise self._error(
                "widths",
                "given, as the widths to project between are unknown",
                None,
                "Pass `widths=(student, teacher)`.",
            )
        return nn.Linear(student_width, teacher_width)

    def features(self, student: Signals, teacher: Signals) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """For each pair: the student's feature, projected; the teacher's; the mask of the tokens or rows that count."""
        keys = [(None, None)] * self.embedding + self.pairs
        for index, (student_key, teacher_key) in enumerate(keys):
            s, t = self._tokens(
                _feature(student, student_key), _feature(teacher, teacher_key), (student_key, teacher_key)
            )
            if self.projections:
                s = self.projections[index](s)
            mask = student.real_tokens(student_key)
            if mask is not None and s.ndim == 2:
                mask = mask.any(1)
            if (
                s.ndim != t.ndim
                or s.shape[: self.shared_dims] != t.shape[: self.shared_dims]
                or (mask is not None and mask.shape != s.shape[: mask.ndim])
            ):
                raise ValueError(
                    f"Expected objective `{self.name}` to get features of the same tokens"
                    f"{' and width' if self.shared_dims is None else ''}, but got {list(s.shape)} of the student and "
                    f"{list(t.shape)} of the teacher"
                    + ("." if mask is None else f", with a mask {list(mask.shape)}.")
                    + (" Pass `widths=(student, teacher)` for other widths." if self.shared_dims is None else "")
                )
            yield s, t, mask

    def _tokens(self, student: Tensor, teacher: Tensor, pair: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """Feature maps ``[B, C, H, W]`` of one size, as tokens ``[B, H * W, C]``; other features as they are."""
        if student.ndim == 4 and teacher.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
            sizes = [tuple(feature.shape[2:]) for feature in (student, teacher)]
            if self.pool_maps:
                size = tuple(map(min, *sizes))
                student, teacher = (nn.functional.adaptive_avg_pool2d(feature, size) for feature in (student, teacher))
            elif self.shared_dims != 1:
                raise self._error(
                    "layers",
                    "pairs of feature maps of one height and width",
                    [pair],
                    f"They are {sizes[0]} of the student and {sizes[1]} of the teacher. Pass `pool_maps=True` to pool "
                    "the larger, or name layers of one resolution.",
                )
        return _as_tokens(student), _as_tokens(teacher)

    def count(self, student: Signals, teacher: Signals) -> Tensor | None:
        """Real tokens, or rows that have one; what a module at a path puts out has to be seen."""
        if are_paths(self.layers):
            return None
        mask = student.token_mask
        if mask is None:
            return torch.tensor(len(student.logits), device=student.logits.device)
        return (mask.any(1) if self.per_row else mask).sum()

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Values ``[B, T]`` or ``[B]`` of one pair of features."""
        raise NotImplementedError

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Loss per token, or per row."""
        return _mean([_loss(self.compare(s, t, mask), mask) for s, t, mask in self.features(student, teacher)])


class HiddenState(FeatureObjective):
    """Mean squared difference of hidden states, see :func:`lightning_distill.functional.hidden_state_mse`.

    Arguments are those of :class:`FeatureObjective`.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import HiddenState
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = HiddenState("last")
        >>> objective.bind(ModelInfo(depth=1, width=4), ModelInfo(depth=2, width=8))
        >>> objective.pairs, objective.projections[0]
        ([(0, 1)], Linear(in_features=4, out_features=8, bias=True))
        >>> student = Signals(torch.zeros(3, 2), hidden_states={0: torch.zeros(3, 5, 4)})
        >>> teacher = Signals(torch.zeros(3, 2), hidden_states={1: torch.zeros(3, 5, 8)})
        >>> objective(student, teacher).values.shape
        torch.Size([3, 5])
    """

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Mean squared difference per token."""
        return functional.hidden_state_mse(student, teacher, mask=mask, reduction="none")


class HiddenStateCosine(FeatureObjective):
    """One minus the cosine of hidden states, see :func:`lightning_distill.functional.hidden_state_cosine`.

    DistilBERT compares the last layers alone. Arguments are those of :class:`FeatureObjective`.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import HiddenStateCosine
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = HiddenStateCosine([(0, 1)])
        >>> objective.bind(ModelInfo(depth=1, width=4), ModelInfo(depth=2, width=4))
        >>> student = Signals(torch.zeros(3, 2), hidden_states={0: torch.ones(3, 5, 4)})
        >>> teacher = Signals(torch.zeros(3, 2), hidden_states={1: -torch.ones(3, 5, 4)})
        >>> round(objective(student, teacher).mean().item(), 4)
        2.0
    """

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """One minus the cosine per token."""
        return functional.hidden_state_cosine(student, teacher, mask=mask, reduction="none")


class PatientHiddenState(FeatureObjective):
    """Distance of the first tokens' directions (PKD), see :func:`lightning_distill.functional.normalized_mse`.

    Only the first real token of each row is read. The paper leaves out the last layer: pass pairs to do the same.

    Arguments are those of :class:`FeatureObjective`.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import PatientHiddenState
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = PatientHiddenState([(0, 1)])
        >>> objective.bind(ModelInfo(depth=1, width=4), ModelInfo(depth=2, width=4))
        >>> student = Signals(torch.zeros(3, 2), hidden_states={0: torch.ones(3, 5, 4)})
        >>> teacher = Signals(torch.zeros(3, 2), hidden_states={1: -torch.ones(3, 5, 4)})
        >>> round(objective(student, teacher).mean().item(), 4)
        4.0
    """

    per_row = True

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Squared distance per row."""
        s, t = (pool(x, mask, "first") for x in (student, teacher))
        return functional.normalized_mse(s, t, mask=_row_mask(mask), reduction="none")


class Flow(FeatureObjective):
    """How features change from one mapped layer to the next (FSP), see :func:`lightning_distill.functional.flow`.

    Arguments are those of :class:`FeatureObjective`; ``layers`` has at least two pairs, in a CNN of one resolution.

    Raises:
        ValueError: If there are fewer than two pairs.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import Flow
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = Flow("first")
        >>> objective.bind(ModelInfo(depth=2, width=4), ModelInfo(depth=3, width=4))
        >>> student = Signals(torch.zeros(3, 2), hidden_states={0: torch.ones(3, 5, 4), 1: torch.ones(3, 5, 4)})
        >>> teacher = Signals(torch.zeros(3, 2), hidden_states={0: torch.ones(3, 5, 4), 1: torch.zeros(3, 5, 4)})
        >>> objective(student, teacher).mean().item()
        1.0
    """

    per_row = True

    def bind(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Pair the layers, and make a projection per pair where it is needed."""
        super().bind(student, teacher)
        if len(self.pairs) + self.embedding < 2:
            raise self._error("layers", "at least two pairs, a flow being from one to the next", self.layers)

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Mean squared difference per row."""
        losses = []
        for (s1, t1, mask), (s2, t2, _) in pairwise(self.features(student, teacher)):
            losses.append(_loss(functional.flow(s1, s2, t1, t2, mask=mask, reduction="none"), mask))
        return _mean(losses)


def pool(feature: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """One vector per row.

    Args:
        feature: Shape ``[B, T, D]``, or ``[B, D]``, which is returned as it is.
        mask: Bool ``[B, T]``, the tokens that count; None where all do.
        pooling: ``"mean"`` over the tokens that count, the ``"first"`` of them, or ``"flatten"``: all of them.

    Returns:
        Shape ``[B, D]``, or ``[B, T * D]`` when flattened.
    """
    feature = full_precision(feature)
    if feature.ndim == 2:
        return feature
    if pooling == "first":
        rows = torch.arange(len(feature), device=feature.device)
        return feature[rows, 0 if mask is None else mask.int().argmax(1)]
    if mask is not None:
        feature = feature.masked_fill(~mask.unsqueeze(-1), 0.0)
    if pooling == "flatten":
        return feature.flatten(1)
    return feature.mean(1) if mask is None else feature.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _feature(signals: Signals, key: int | str | None) -> Tensor:
    """Output of a layer or a module, or the embedding."""
    if key is None:
        assert signals.embedding is not None
        return signals.embedding
    return signals.modules[key] if isinstance(key, str) else signals.hidden_states[key]


def _as_tokens(feature: Tensor) -> Tensor:
    return feature.flatten(2).transpose(1, 2) if feature.ndim == 4 else feature


def _row_mask(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.ndim == 1 else mask.any(1)


def _loss(values: Tensor, mask: Tensor | None) -> Loss:
    return Loss(values, _row_mask(mask) if values.ndim == 1 else mask)


def _mean(losses: Sequence[Loss]) -> Loss:
    """Mean of the losses of several pairs, per token, or per row where the pairs have no common tokens."""
    if len({loss.values.shape for loss in losses}) > 1:
        losses = [_per_row(loss) for loss in losses]
    return Loss(torch.stack([loss.values for loss in losses]).mean(0), losses[0].mask)


def _per_row(loss: Loss) -> Loss:
    if loss.values.ndim == 1:
        return loss
    if loss.mask is None:
        return Loss(loss.values.mean(1))
    values = loss.values.masked_fill(~loss.mask, 0.0).sum(1) / loss.mask.sum(1).clamp(min=1)
    return Loss(values, loss.mask.any(1))
