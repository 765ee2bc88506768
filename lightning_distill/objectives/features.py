"""Objectives on hidden states and other features of the two models, layer by layer."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill import functional
from lightning_distill.layer_map import layer_map
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.signals import ModelInfo, Request, Signals, near

#: A named map, a teacher layer per student layer, or pairs (student, teacher) of layers or of module paths.
FeatureLayers = str | list[int] | list[tuple[int, int]] | list[tuple[str, str]]


class FeatureObjective(Objective):
    """Compares features of paired layers; subclasses define :meth:`compare`.

    The values of several pairs are averaged. Features are ``[B, T, D]`` or ``[B, D]``; a feature map ``[B, C, H, W]``
    is read as ``H * W`` tokens of width ``C``.

    Args:
        layers: A named map (see :func:`lightning_distill.layer_map.layer_map`), a teacher layer per student layer,
            or pairs ``(student, teacher)`` of layers (from 0) or of module paths.
        embedding: Whether the input of the first layers is a pair too.
        projection: Whether each student feature is mapped to the teacher's width by a learned linear layer; None:
            where the widths differ.
        widths: Widths ``(student, teacher)`` of the features, where they cannot be read off the models.
        weight: Factor of the loss in the total.
        name: What it is logged as.
    """

    def __init__(
        self,
        layers: FeatureLayers = "uniform",
        *,
        embedding: bool = False,
        projection: bool | None = None,
        widths: tuple[int, int] | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.layers, self.embedding, self.projection, self.widths = layers, embedding, projection, widths
        #: Layers or module paths, ``(student, teacher)``; set by :meth:`bind`.
        self.pairs: list[tuple[Any, Any]] = []
        self.projections = nn.ModuleList()

    def bind(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Pair the layers, and make a projection per pair where it is needed."""
        if _are_paths(self.layers):
            paths: Any = self.layers
            self.pairs = [tuple(pair) for pair in paths]
            for side, (role, info) in enumerate((("student", student), ("teacher", teacher))):
                for path in (pair[side] for pair in self.pairs):
                    if path not in info.modules:
                        raise ValueError(
                            f"Expected argument `layers` of objective `{self.name}` to name modules of the {role}, but "
                            f"got {path!r}{near(path, info.modules)}"
                        )
            widths = [(student.modules[s], teacher.modules[t]) for s, t in self.pairs]
        else:
            self.pairs = self._map_layers(student, teacher)
            widths = [(student.width, teacher.width)] * len(self.pairs)
        widths = [(student.width, teacher.width)] * self.embedding + widths
        self.student_request, self.teacher_request = self._request(0), self._request(1)
        self._make_projections(widths)

    def _request(self, side: int) -> Request:
        ends = [pair[side] for pair in self.pairs]
        return Request(
            hidden_states=frozenset(end for end in ends if isinstance(end, int)),
            modules=frozenset(end for end in ends if isinstance(end, str)),
            embedding=self.embedding,
        )

    def _map_layers(self, student: ModelInfo, teacher: ModelInfo) -> list[tuple[int, int]]:
        if student.depth is None or teacher.depth is None:
            role = "student" if student.depth is None else "teacher"
            raise self._error(
                "layers",
                "pairs of module paths",
                self.layers,
                f"The {role} has no stack of equal layers; among its modules are "
                f"{list((student if role == 'student' else teacher).modules)[:8]}.",
            )
        try:
            return layer_map(self.layers, student.depth, teacher.depth)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"Objective `{self.name}`: {error}") from None

    def _make_projections(self, widths: Sequence[tuple[int | None, int | None]]) -> None:
        widths = [self.widths or pair for pair in widths]
        # A width that a class does not tell may well be equal: only a projection has to know it.
        differ = any(None not in pair and pair[0] != pair[1] for pair in widths)
        self.projections = nn.ModuleList()
        if self.projection is False:
            if differ:
                raise self._error(
                    "projection", f"left out or True, as the widths {widths[0]} of student and teacher differ", False
                )
            return
        if not (self.projection or differ):
            return
        for width in widths:
            if width[0] is None or width[1] is None:
                raise self._error(
                    "widths",
                    "given where a projection is made between features of unknown width",
                    self.widths,
                    "Pass `widths=(student, teacher)`.",
                )
            self.projections.append(nn.Linear(width[0], width[1]))

    def features(self, student: Signals, teacher: Signals) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """For each pair: the student's feature, projected; the teacher's; the mask of the tokens that count."""
        keys = [(None, None)] * self.embedding + self.pairs
        for index, (student_key, teacher_key) in enumerate(keys):
            s, t = _feature(student, student_key), _feature(teacher, teacher_key)
            if self.projections:
                s = self.projections[index](s)
            mask = student.token_mask if s.ndim == 3 else None
            if s.shape != t.shape or (mask is not None and mask.shape != s.shape[:2]):
                raise ValueError(
                    f"Expected objective `{self.name}` to get features of the same shape, but got {list(s.shape)} of "
                    f"the student and {list(t.shape)} of the teacher"
                    + ("" if mask is None else f", with a token mask {list(mask.shape)}")
                    + ". Both must read the same tokens; pass `widths=(student, teacher)` for features of other widths."
                )
            yield s, t, mask

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Values ``[B, T]`` or ``[B]`` of one pair of features."""
        raise NotImplementedError

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Loss per token, or per row of features that have no tokens."""
        values, masks = [], []
        for s, t, mask in self.features(student, teacher):
            values.append(self.compare(s, t, mask))
            masks.append(mask)
        if len({value.shape for value in values}) == 1:
            return Loss(torch.stack(values).mean(0), masks[0])
        # Features of several resolutions have no common tokens: each row then has the mean of each pair's.
        rows = [Loss(value, mask) for value, mask in zip(values, masks, strict=True)]
        return Loss(torch.stack([_per_row(loss) for loss in rows]).mean(0))


class HiddenState(FeatureObjective):
    """Mean squared difference of hidden states, see :func:`lightning_distill.functional.hidden_state_mse`.

    Args:
        layers: A named map, a teacher layer per student layer, or pairs of layers or of module paths.
        embedding: Whether the input of the first layers is a pair too.
        projection: Whether student states go through a learned linear layer; None: where the widths differ.
        widths: Widths ``(student, teacher)``, where they cannot be read off the models.
        weight: Factor of the loss in the total.
        name: What it is logged as.

    Raises:
        ValueError: If the models do not have these layers or modules, or a projection lacks a width.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import HiddenState
        >>> from lightning_distill.signals import ModelInfo, Signals
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

    Args:
        layers: As in :class:`HiddenState`; DistilBERT compares the last layers only.
        embedding: Whether the input of the first layers is a pair too.
        projection: Whether student states go through a learned linear layer; None: where the widths differ.
        widths: Widths ``(student, teacher)``, where they cannot be read off the models.
        weight: Factor of the loss in the total.
        name: What it is logged as.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import HiddenStateCosine
        >>> from lightning_distill.signals import ModelInfo, Signals
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


def _are_paths(layers: FeatureLayers) -> bool:
    return not isinstance(layers, str) and any(
        not isinstance(pair, int) and isinstance(pair[0], str) for pair in layers
    )


def _feature(signals: Signals, key: int | str | None) -> Tensor:
    """Output of a layer or a module, or the embedding; a map ``[B, C, H, W]`` as tokens ``[B, H * W, C]``."""
    if key is None:
        assert signals.embedding is not None
        feature = signals.embedding
    else:
        feature = signals.modules[key] if isinstance(key, str) else signals.hidden_states[key]
    return feature.flatten(2).transpose(1, 2) if feature.ndim == 4 else feature


def _per_row(loss: Loss) -> Tensor:
    if loss.values.ndim == 1:
        return loss.values
    if loss.mask is None:
        return loss.values.mean(1)
    return loss.values.masked_fill(~loss.mask, 0.0).sum(1) / loss.mask.sum(1).clamp(min=1)
