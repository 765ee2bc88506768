"""Lightning callbacks, one a file; each works alone in any Lightning project."""

if __name__ != "lightning_distill.callbacks":
    raise ImportError(
        "Expected the callbacks to be imported as `lightning_distill.callbacks`, but got the folder itself as "
        f"`{__name__}`. Write `from lightning_distill.callbacks import ...`, so that no class exists twice."
    )

from lightning_distill.callbacks.early_exit import EarlyExit
from lightning_distill.callbacks.gptq import GPTQ
from lightning_distill.callbacks.gradient_clipping import GradientClipping
from lightning_distill.callbacks.init_policy import InitPolicy
from lightning_distill.callbacks.loss_advice import LossAdvice
from lightning_distill.callbacks.lr_finder import LRFinder
from lightning_distill.callbacks.resumable import Resumable
from lightning_distill.callbacks.schedule_free import ScheduleFree
from lightning_distill.callbacks.teacher_cache import TeacherCache
from lightning_distill.training.finite_loss import FiniteLoss

# Below the module, which has it on; flags and YAML name it as the others.
FiniteLoss.__module__ = __name__

__all__ = [
    "GPTQ",
    "EarlyExit",
    "FiniteLoss",
    "GradientClipping",
    "InitPolicy",
    "LRFinder",
    "LossAdvice",
    "Resumable",
    "ScheduleFree",
    "TeacherCache",
]
