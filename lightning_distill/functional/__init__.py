"""Pure functions on tensors."""

from lightning_distill.functional.attention_map import attention_map
from lightning_distill.functional.hard_label import IGNORE_INDEX, hard_label
from lightning_distill.functional.hidden_state import hidden_state_cosine, hidden_state_mse
from lightning_distill.functional.lr_suggestion import lr_suggestion, smooth_losses, trim_curve
from lightning_distill.functional.soft_target import logits_mse, soft_target

__all__ = [
    "IGNORE_INDEX",
    "attention_map",
    "hard_label",
    "hidden_state_cosine",
    "hidden_state_mse",
    "logits_mse",
    "lr_suggestion",
    "smooth_losses",
    "soft_target",
    "trim_curve",
]
