"""Pure functions on tensors.

Here belongs what is computed, with its formula, shapes and source, on the student's tensor before the teacher's. No
function here knows a model, a batch or an objective.
"""

from lightning_distill.functional.attention_map import attention_divergence, attention_map
from lightning_distill.functional.batch_relations import (
    contrastive,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from lightning_distill.functional.correlation import correlation
from lightning_distill.functional.early_exit import agreement_run, confidence, margin, normalized_entropy
from lightning_distill.functional.embeddings import (
    candidate_scores,
    cosent,
    embedding_similarity,
    listwise_kl,
    margin_mse,
)
from lightning_distill.functional.features import attention_transfer, flow, neuron_selectivity, normalized_mse
from lightning_distill.functional.hard_label import IGNORE_INDEX, hard_label
from lightning_distill.functional.hidden_state import hidden_state_cosine, hidden_state_mse
from lightning_distill.functional.linear import linear_cosine, linear_soft_target
from lightning_distill.functional.logits import (
    combine_teachers,
    decoupled,
    logits_cosine,
    logits_mse,
    top_k_soft_target,
)
from lightning_distill.functional.range_test import lr_suggestion, smooth_losses, trim_curve
from lightning_distill.functional.relation import relation
from lightning_distill.functional.reverse_gradient import reverse_gradient
from lightning_distill.functional.sharded import sharded_soft_target
from lightning_distill.functional.shared_spans import shared_spans
from lightning_distill.functional.soft_target import soft_target
from lightning_distill.functional.standardize import standardize
from lightning_distill.functional.universal_logit import matched_words, merged_universal_logit, universal_logit

__all__ = [
    "IGNORE_INDEX",
    "agreement_run",
    "attention_divergence",
    "attention_map",
    "attention_transfer",
    "candidate_scores",
    "combine_teachers",
    "confidence",
    "contrastive",
    "correlation",
    "cosent",
    "decoupled",
    "embedding_similarity",
    "flow",
    "hard_label",
    "hidden_state_cosine",
    "hidden_state_mse",
    "linear_cosine",
    "linear_soft_target",
    "listwise_kl",
    "logits_cosine",
    "logits_mse",
    "lr_suggestion",
    "margin",
    "margin_mse",
    "matched_words",
    "merged_universal_logit",
    "neuron_selectivity",
    "normalized_entropy",
    "normalized_mse",
    "relation",
    "relational_angle",
    "relational_distance",
    "reverse_gradient",
    "sharded_soft_target",
    "shared_spans",
    "similarity_preserving",
    "smooth_losses",
    "soft_target",
    "standardize",
    "top_k_soft_target",
    "trim_curve",
    "universal_logit",
]
