"""Distillation losses as pure functions on tensors."""

from lightning_distill.functional.attention_map import attention_map
from lightning_distill.functional.hard_label import hard_label
from lightning_distill.functional.hidden_state import hidden_state_cosine, hidden_state_mse
from lightning_distill.functional.soft_target import logits_mse, soft_target

__all__ = [
    "attention_map",
    "hard_label",
    "hidden_state_cosine",
    "hidden_state_mse",
    "logits_mse",
    "soft_target",
]
