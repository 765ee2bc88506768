"""InitPolicy: initialise weights before training by the activation that follows, and say what was done."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_distill.initialization import Initialized, Policy, initialize


class InitPolicy(L.Callback):
    """Initialises the weights of a module at ``setup``, and writes an audit of it to ``init_policy.json``.

    ``setup`` comes before ``configure_model``, so before FSDP2 shards, and before every strategy loads a checkpoint: a
    resumed run ends up with the checkpoint's weights. Modules that are only built later, in the module's own ``setup``
    or ``configure_model``, are not seen. The seed alone decides the numbers, so every process draws the same.

    Args:
        policy: ``"auto"`` or the name of one rule, see :func:`lightning_distill.initialization.init_weight_`.
        only: ``"new"`` leaves alone what lies in a transformers model that came from ``from_pretrained``; ``"all"``
            touches everything; or patterns on names of modules, such as ``["student.classifier*"]``. Transformers does
            not note which weights a checkpoint lacked, so name a new head on a loaded model by its pattern.
        std: standard deviation for embeddings and the truncated normal of transformers.
        seed: seed of the random numbers.
        output_dir: folder of the audit; by default the Trainer's ``default_root_dir``.

    Attributes:
        audit: one line for each weight drawn.

    Raises:
        ValueError: an argument is out of its range, a pattern matches nothing, or a parameter is on the meta device.

    Example:
        >>> InitPolicy("kaiming_normal", only=["head*"]).policy
        'kaiming_normal'

    Source: Glorot and Bengio 2010 (Xavier); He et al. 2015; Klambauer et al. 2017 (LeCun for SELU).
    """

    def __init__(
        self,
        policy: Policy = "auto",
        *,
        only: str | Sequence[str] = "new",
        std: float = 0.02,
        seed: int = 0,
        output_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        if policy not in get_args(Policy):
            raise ValueError(
                f"Expected argument `policy` to be one of {', '.join(get_args(Policy))}, but got {policy!r}"
            )
        if std <= 0:
            raise ValueError(f"Expected argument `std` to be positive, but got {std}")
        if not only:
            raise ValueError(f"Expected argument `only` to be 'new', 'all' or patterns, but got {only!r}")
        self.policy: Policy = policy
        self.only, self.std, self.seed, self.output_dir = only, std, seed, output_dir
        self.audit: list[Initialized] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Initialise, unless the module has been trained already."""
        if stage != "fit" or trainer.global_step > 0 or trainer.ckpt_path is not None:
            return
        if self.only == "all":
            patterns = None
        elif self.only == "new":
            loaded = [name for name, module in pl_module.named_modules() if _is_loaded(module)]
            names = [name for name, _ in pl_module.named_modules()]
            patterns = [n for n in names if not any(not f or n == f or n.startswith(f"{f}.") for f in loaded)]
        else:
            patterns = [self.only] if isinstance(self.only, str) else list(self.only)
        self.audit = initialize(pl_module, self.policy, patterns, std=self.std, seed=self.seed)
        self._report(trainer)

    @rank_zero_only
    def _report(self, trainer: L.Trainer) -> None:
        folder = Path(self.output_dir if self.output_dir is not None else trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "init_policy.json").write_text(json.dumps([line.as_dict() for line in self.audit], indent=1))
        table = Table(*Initialized.__dataclass_fields__, title=f"InitPolicy {self.policy}")
        for line in self.audit:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in line.as_dict().values()))
        Console(stderr=True).print(table)


def _is_loaded(module: nn.Module) -> bool:
    return bool(getattr(module, "name_or_path", "")) and hasattr(module, "config")
