"""Early exit: ramps, criteria, exact batched inference, calibration.

Here belongs how rows leave early, what that costs, and what ramps learn from. When they learn belongs into
``callbacks/early_exit.py``; measures of how sure an answer is are functions in ``functional/``.
"""

from lightning_distill.early_exit.calibration import calibrate
from lightning_distill.early_exit.criteria import (
    AllOf,
    AnyOf,
    Confidence,
    Criterion,
    Entropy,
    LearnedGate,
    Margin,
    Patience,
)
from lightning_distill.early_exit.model import EarlyExitModel
from lightning_distill.early_exit.ramps import Ramp, Ramps, make_ramps
from lightning_distill.early_exit.report import Calibration

__all__ = [
    "AllOf",
    "AnyOf",
    "Calibration",
    "Confidence",
    "Criterion",
    "EarlyExitModel",
    "Entropy",
    "LearnedGate",
    "Margin",
    "Patience",
    "Ramp",
    "Ramps",
    "calibrate",
    "make_ramps",
]
