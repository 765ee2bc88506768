"""Objectives: what a student learns, each with a weight, a name, and a loss per item of two signals.

Here belong thin classes over ``functional/``: arguments, layers, schedules, the signals that they need, their chunked
and top-k forms. An objective never sees a batch or a model.
"""

from lightning_distill.objectives.activations import AttentionTransfer, NeuronSelectivity
from lightning_distill.objectives.attention import AttentionMap, AttentionRelation
from lightning_distill.objectives.balance import GradientNormBalance, UncertaintyBalance
from lightning_distill.objectives.batch_relations import (
    Contrastive,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
)
from lightning_distill.objectives.correlation import Correlation
from lightning_distill.objectives.curriculum import CurriculumTemperature
from lightning_distill.objectives.decoupled import Decoupled
from lightning_distill.objectives.embeddings import (
    CoSENT,
    EmbeddingDistance,
    EmbeddingSimilarity,
    ListwiseKL,
    MarginMSE,
)
from lightning_distill.objectives.features import (
    FeatureObjective,
    Flow,
    HiddenState,
    HiddenStateCosine,
    PatientHiddenState,
)
from lightning_distill.objectives.logits import (
    HardLabel,
    LogitsCosine,
    LogitsMSE,
    SoftTarget,
    TopKSoftTarget,
)
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.objectives.schedule import CosineSchedule, LinearSchedule, StepSchedule
from lightning_distill.objectives.universal_logit import UniversalLogit

__all__ = [
    "AttentionMap",
    "AttentionRelation",
    "AttentionTransfer",
    "CoSENT",
    "Contrastive",
    "Correlation",
    "CosineSchedule",
    "CurriculumTemperature",
    "Decoupled",
    "EmbeddingDistance",
    "EmbeddingSimilarity",
    "FeatureObjective",
    "Flow",
    "GradientNormBalance",
    "HardLabel",
    "HiddenState",
    "HiddenStateCosine",
    "LinearSchedule",
    "ListwiseKL",
    "LogitsCosine",
    "LogitsMSE",
    "Loss",
    "MarginMSE",
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
