"""What one forward leaves behind, and how it is recorded without changing the model or slowing its attention.

Here belong the signals, the recorder with its hooks, and what is known of a model without running it. What is made of
signals (losses) belongs into ``objectives/``; which logits answer which labels into ``tasks/``.
"""

from lightning_distill.functional.attention import Attention
from lightning_distill.signals.description import ModelInfo, describe, find_decoder, find_layers, get_submodule
from lightning_distill.signals.recorder import Recorder, capture
from lightning_distill.signals.signals import Captured, Request, Signals

__all__ = [
    "Attention",
    "Captured",
    "ModelInfo",
    "Recorder",
    "Request",
    "Signals",
    "capture",
    "describe",
    "find_decoder",
    "find_layers",
    "get_submodule",
]
