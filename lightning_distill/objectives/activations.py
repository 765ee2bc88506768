"""Objectives on where neurons are active, whatever their number."""

from torch import Tensor

from lightning_distill import functional
from lightning_distill.arguments import typed
from lightning_distill.objectives.features import FeatureLayers, FeatureObjective
from lightning_distill.objectives.schedule import Scheduled


@typed
class NeuronSelectivity(FeatureObjective):
    """Where each neuron is active (NST), see :func:`lightning_distill.functional.neuron_selectivity`.

    Widths may differ; there is no projection.

    Args:
        layers: As in :class:`HiddenState`.
        embedding: Whether the input of the first layers is a pair too.
        pool_maps: Whether of two feature maps the larger is pooled to the height and width of the smaller.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import NeuronSelectivity
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = NeuronSelectivity([("conv", "conv")])
        >>> objective.bind(ModelInfo(modules={"conv": 4}), ModelInfo(modules={"conv": 8}))
        >>> student = Signals(torch.zeros(3, 2), modules={"conv": torch.ones(3, 4, 5, 5)})
        >>> teacher = Signals(torch.zeros(3, 2), modules={"conv": torch.ones(3, 8, 5, 5)})
        >>> round(objective(student, teacher).mean().item(), 4)
        0.0
    """

    per_row = True
    shared_dims = 2

    def __init__(
        self,
        layers: FeatureLayers = "uniform",
        *,
        embedding: bool = False,
        pool_maps: bool = False,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, embedding=embedding, pool_maps=pool_maps, weight=weight, name=name)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Squared discrepancy per row."""
        return functional.neuron_selectivity(student, teacher, mask=mask, reduction="none")


class AttentionTransfer(NeuronSelectivity):
    """Where activations are large (AT), see :func:`lightning_distill.functional.attention_transfer`.

    Widths may differ; there is no projection.

    Arguments are those of :class:`NeuronSelectivity`.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import AttentionTransfer
        >>> from lightning_distill.signals.description import ModelInfo
        >>> from lightning_distill.signals.signals import Signals
        >>> objective = AttentionTransfer([("conv", "conv")])
        >>> objective.bind(ModelInfo(modules={"conv": 4}), ModelInfo(modules={"conv": 8}))
        >>> student = Signals(torch.zeros(3, 2), modules={"conv": torch.ones(3, 4, 5, 5)})
        >>> teacher = Signals(torch.zeros(3, 2), modules={"conv": torch.ones(3, 8, 5, 5)})
        >>> round(objective(student, teacher).mean().item(), 4)
        0.0
    """

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Mean squared difference per row."""
        return functional.attention_transfer(student, teacher, mask=mask, reduction="none")
