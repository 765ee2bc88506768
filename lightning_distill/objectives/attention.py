"""Objectives on the attention of the two models."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_distill import functional
from lightning_distill.arguments import typed
from lightning_distill.functional.attention_map import AttentionDivergence
from lightning_distill.objectives.objective import Loss, Objective, are_paths, paired
from lightning_distill.objectives.schedule import Scheduled
from lightning_distill.signals.description import ModelInfo
from lightning_distill.signals.signals import Request, Signals, is_within

#: A named map, a teacher layer per student layer, or pairs (student, teacher) of layers or of their paths.
AttentionLayers = str | list[int] | list[tuple[int, int]] | list[tuple[str, str]]

#: Which vectors of a layer's attention are related: queries, keys, values with themselves, or queries with keys.
RelationKind = Literal["qq", "kk", "vv", "qk"]
_FIELDS = {"q": "query", "k": "key", "v": "value"}


class _AttentionObjective(Objective):
    """Reads the queries, keys and values of paired layers."""

    reads_logits = False

    def __init__(self, layers: AttentionLayers | None, weight: Scheduled, name: str | None) -> None:
        super().__init__(weight, name)
        self.layers = layers
        #: Pairs ``(student, teacher)`` of layers; set by :meth:`bind`.
        self.pairs: list[tuple[Any, Any]] = []

    def bind(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Pair the layers."""
        for role, info in (("student", student), ("teacher", teacher)):
            if info.no_attention is not None:
                raise ValueError(
                    f"Expected objective `{self.name}` to find attention in both models, but the {role}'s "
                    f"{info.no_attention}. Use an objective on hidden states, or on logits."
                )
            if info.depth is None or info.num_heads is None:
                raise ValueError(
                    f"Expected objective `{self.name}` to find attention in both models, but got a {role} that is no "
                    "transformers model with a stack of layers with attention. "
                    f"{info.no_layers or 'Use an objective on module paths, or on logits.'}"
                )
        last = [(student.depth - 1, teacher.depth - 1)]  # type: ignore[operator]
        self.pairs = paired(self, last if self.layers is None else self.layers, student, teacher)
        for side, info in enumerate((student, teacher)):
            for path in info.cross_attention:
                if inside := [pair[side] for pair in self.pairs if is_within(pair[side], path)]:
                    raise self._error(
                        "layers",
                        "layers that attend to their own tokens",
                        inside[0],
                        "It attends to the encoder's, whose padding is another. Name the decoder's layer, whose first "
                        "attention is compared, or compare what the module puts out by `HiddenState`.",
                    )
        self.student_request, self.teacher_request = (
            Request(attention=frozenset(pair[side] for pair in self.pairs)) for side in (0, 1)
        )

    def count(self, student: Signals, teacher: Signals) -> Tensor | None:
        """Real tokens; those at a path may be a decoder's, which have to be seen."""
        if are_paths(self.layers):
            return None
        if student.token_mask is None:
            return torch.tensor(len(student.logits), device=student.logits.device)
        return student.token_mask.sum()


@typed
class AttentionMap(_AttentionObjective):
    """Difference of attention maps, see :func:`lightning_distill.functional.attention_divergence`.

    The maps are computed from queries and keys of the mapped layers alone, block by block; the models keep their fast
    attention. The values of several pairs of layers are averaged. Where student and teacher differ in heads, the mean
    map over the heads of each is compared.

    Args:
        layers: A named map (see :func:`lightning_distill.students.layer_map`), a teacher layer per student layer, or
            pairs ``(student, teacher)`` of layers, from 0, or of their paths (those of a decoder beside an encoder).
        divergence: ``"mse"`` or ``"kl"``.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If a model has no attention, or not these layers.

    Example:
        >>> import torch
        >>> from lightning_distill.functional.attention import Attention
        >>> from lightning_distill.objectives import AttentionMap
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = AttentionMap("last", divergence="kl")
        >>> objective.bind(ModelInfo(depth=1, num_heads=2), ModelInfo(depth=3, num_heads=2))
        >>> q = torch.randn(1, 2, 5, 4)
        >>> attention = Attention(q, q, q, mask=None, scaling=0.5, is_causal=False)
        >>> student = Signals(torch.zeros(1, 2), attention={0: attention})
        >>> teacher = Signals(torch.zeros(1, 2), attention={2: attention})
        >>> objective(student, teacher).values.shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        layers: AttentionLayers = "uniform",
        divergence: AttentionDivergence = "mse",
        *,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, weight, name)
        if divergence not in get_args(AttentionDivergence):
            raise self._error("divergence", '"mse" or "kl"', divergence)
        self.divergence = divergence

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Loss per query."""
        mask = student.real_tokens(self.pairs[0][0])
        values = [
            functional.attention_divergence(
                student.attention[s],
                teacher.attention[t],
                divergence=self.divergence,
                mask=mask,
                reduction="none",
            )
            for s, t in self.pairs
        ]
        return Loss(torch.stack(values).mean(0), mask)


@typed
class AttentionRelation(_AttentionObjective):
    """Self-attention relations of MiniLM and MiniLMv2, see :func:`lightning_distill.functional.relation`.

    Student and teacher may differ in heads and width. The values of the kinds are summed, as in the papers; those of
    several pairs of layers are averaged. MiniLM is ``AttentionMap([(last, last)], "kl")`` with
    ``AttentionRelation(kinds=("vv",))``; MiniLMv2 is the default here, for large teachers with an upper middle layer.

    Args:
        layers: As in :class:`AttentionMap`; None: the last layer of each.
        kinds: Of ``"qq"``, ``"kk"``, ``"vv"`` and ``"qk"``; None: the first three. The kinds may also stand first.
        relation_heads: Number of relation heads, which divides the joined width of the heads of both models; None: the
            greatest common divisor of their numbers of heads.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If a model has no attention, or not these layers, or the relation heads do not divide.

    Example:
        >>> import torch
        >>> from lightning_distill.functional.attention import Attention
        >>> from lightning_distill.objectives import AttentionRelation
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = AttentionRelation()
        >>> student_info = ModelInfo(depth=1, num_heads=2, head_width=4)
        >>> objective.bind(student_info, ModelInfo(depth=3, num_heads=6, head_width=4))
        >>> objective.pairs, objective.relation_heads
        ([(0, 2)], 2)
        >>> q, r = torch.randn(1, 2, 5, 4), torch.randn(1, 6, 5, 4)
        >>> student = Signals(torch.zeros(1, 2), attention={0: Attention(q, q, q, None, 0.5, False)})
        >>> teacher = Signals(torch.zeros(1, 2), attention={2: Attention(r, r, r, None, 0.5, False)})
        >>> objective(student, teacher).values.shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        layers: AttentionLayers | tuple[RelationKind, ...] | None = None,
        kinds: tuple[RelationKind, ...] | AttentionLayers | None = None,
        *,
        relation_heads: int | None = None,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        # Kinds stood first once; no layers are a list of strings.
        if isinstance(layers, list | tuple) and all(isinstance(item, str) for item in layers):
            layers, kinds = kinds, layers
        super().__init__(layers, weight, name)  # type: ignore[arg-type]
        self.kinds: Any = ("qq", "kk", "vv") if kinds is None else tuple(kinds)
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or set(self.kinds) - set(get_args(RelationKind)):
            raise self._error("kinds", f"some of {get_args(RelationKind)}, each once", kinds)
        self.relation_heads = relation_heads

    def bind(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Pair the layers and choose the number of relation heads."""
        super().bind(student, teacher)
        assert student.num_heads is not None
        assert teacher.num_heads is not None
        if self.relation_heads is None:
            self.relation_heads = math.gcd(student.num_heads, teacher.num_heads)
        for role, info in (("student", student), ("teacher", teacher)):
            width = info.num_heads * (info.head_width or 0)  # type: ignore[operator]
            if self.relation_heads < 1 or width % self.relation_heads:
                raise self._error(
                    "relation_heads", f"a divisor of {width}, the {role}'s heads together", self.relation_heads
                )

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Loss per token."""
        assert self.relation_heads is not None
        values, mask = [], student.real_tokens(self.pairs[0][0])
        for s, t in self.pairs:
            one, other = student.attention[s], teacher.attention[t]
            for first, second in ((_FIELDS[kind[0]], _FIELDS[kind[1]]) for kind in self.kinds):
                values.append(
                    functional.relation(
                        (getattr(one, first), getattr(one, second)),
                        (getattr(other, first), getattr(other, second)),
                        relation_heads=self.relation_heads,
                        mask=mask,
                        reduction="none",
                    )
                )
        return Loss(torch.stack(values).sum(0) / len(self.pairs), mask)
