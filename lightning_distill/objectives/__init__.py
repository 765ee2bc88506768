"""What a student learns: thin classes over :mod:`lightning_distill.functional`."""

from lightning_distill.objectives.attention import AttentionMap
from lightning_distill.objectives.features import FeatureObjective, HiddenState, HiddenStateCosine
from lightning_distill.objectives.logits import HardLabel, SoftTarget
from lightning_distill.objectives.objective import Loss, Objective

__all__ = [
    "AttentionMap",
    "FeatureObjective",
    "HardLabel",
    "HiddenState",
    "HiddenStateCosine",
    "Loss",
    "Objective",
    "SoftTarget",
]
