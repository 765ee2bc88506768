"""Objectives on the attention of the two models."""

import torch

from lightning_distill import functional
from lightning_distill.functional.attention_map import AttentionDivergence
from lightning_distill.layer_map import layer_map
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.signals import ModelInfo, Request, Signals

#: A named map, a teacher layer per student layer, or pairs (student, teacher) of layers.
AttentionLayers = str | list[int] | list[tuple[int, int]]


class AttentionMap(Objective):
    """Difference of attention maps, see :func:`lightning_distill.functional.attention_map`.

    The maps are computed from queries and keys of the mapped layers alone; the models keep their fast attention. The
    values of several pairs of layers are averaged. Where student and teacher differ in heads, the mean map over the
    heads of each is compared.

    Args:
        layers: A named map (see :func:`lightning_distill.layer_map.layer_map`), a teacher layer per student layer, or
            pairs ``(student, teacher)`` of layers, from 0.
        divergence: ``"mse"`` or ``"kl"``.
        weight: Factor of the loss in the total.
        name: What it is logged as.

    Raises:
        ValueError: If a model has no attention, or not these layers.

    Example:
        >>> import torch
        >>> from lightning_distill.attention import Attention
        >>> from lightning_distill.objectives import AttentionMap
        >>> from lightning_distill.signals import ModelInfo, Signals
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
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if divergence not in ("mse", "kl"):
            raise self._error("divergence", '"mse" or "kl"', divergence)
        self.layers, self.divergence = layers, divergence
        self.pairs: list[tuple[int, int]] = []

    def bind(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Pair the layers."""
        for role, info in (("student", student), ("teacher", teacher)):
            if info.depth is None or info.num_heads is None:
                raise ValueError(
                    f"Expected objective `{self.name}` to find attention in both models, but got a {role} that is no "
                    "transformers model with attention. Use an objective on module paths, or on logits."
                )
        assert student.depth is not None
        assert teacher.depth is not None
        try:
            self.pairs = layer_map(self.layers, student.depth, teacher.depth)
        except ValueError as error:
            raise ValueError(f"Objective `{self.name}`: {error}") from None
        self.student_request, self.teacher_request = (
            Request(attention=frozenset(pair[side] for pair in self.pairs)) for side in (0, 1)
        )

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Loss per query."""
        values = []
        for s, t in self.pairs:
            student_map, teacher_map = student.attention[s].probabilities(), teacher.attention[t].probabilities()
            if student_map.shape[1] != teacher_map.shape[1]:
                student_map, teacher_map = student_map.mean(1, keepdim=True), teacher_map.mean(1, keepdim=True)
            values.append(
                functional.attention_map(
                    student_map, teacher_map, divergence=self.divergence, mask=student.token_mask, reduction="none"
                )
            )
        return Loss(torch.stack(values).mean(0), student.token_mask)
