"""What a student learns: thin classes over :mod:`lightning_distill.functional`."""

from lightning_distill.objectives.activations import AttentionTransfer, NeuronSelectivity
from lightning_distill.objectives.attention import AttentionMap, AttentionRelation
from lightning_distill.objectives.balance import GradientNormBalance, UncertaintyBalance
from lightning_distill.objectives.batch_relations import (
    Contrastive,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
)
from lightning_distill.objectives.features import (
    FeatureObjective,
    Flow,
    HiddenState,
    HiddenStateCosine,
    PatientHiddenState,
)
from lightning_distill.objectives.logits import Decoupled, HardLabel, LogitsMSE, SoftTarget, TopKSoftTarget
from lightning_distill.objectives.logits_cosine import LogitsCosine
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.objectives.schedule import CosineSchedule, LinearSchedule, StepSchedule
from lightning_distill.objectives.universal_logit import UniversalLogit

__all__ = [
    "AttentionMap",
    "AttentionRelation",
    "AttentionTransfer",
    "Contrastive",
    "CosineSchedule",
    "Decoupled",
    "FeatureObjective",
    "Flow",
    "GradientNormBalance",
    "HardLabel",
    "HiddenState",
    "HiddenStateCosine",
    "LinearSchedule",
    "LogitsCosine",
    "LogitsMSE",
    "Loss",
    "NeuronSelectivity",
    "Objective",
    "PatientHiddenState",
    "RelationalAngle",
    "RelationalDistance",
    "SimilarityPreserving",
    "SoftTarget",
    "StepSchedule",
    "TopKSoftTarget",
    "UncertaintyBalance",
    "UniversalLogit",
]
