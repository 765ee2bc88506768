"""Lightning callbacks, one a file; each works alone in any Lightning project."""

if __name__ != "lightning_distill.callbacks":
    raise ImportError(
        "Expected the callbacks to be imported as `lightning_distill.callbacks`, but got the folder itself as "
        f"`{__name__}`. Write `from lightning_distill.callbacks import ...`, so that no class exists twice."
    )

from lightning_distill.callbacks.gradient_clipping import GradientClipping
from lightning_distill.callbacks.lr_finder import LRFinder

__all__ = ["GradientClipping", "LRFinder"]
