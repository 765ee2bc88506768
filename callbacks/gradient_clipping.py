"""GradientClipping: five ways to bound a gradient before the optimizer's step."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_distill.functional.clipping import (
    clip_adaptively_,
    clip_by_value_,
    group_tensors,
    norm_coefficient,
    percentile_threshold,
    scale_,
    total_norm,
    zscore_threshold,
)

_DEFAULT_THRESHOLDS = {"norm": 1.0, "value": 0.5, "adaptive": 0.01, "percentile": 10.0, "zscore": 2.5}
_Units = list[list[list[nn.Parameter]]]
"""Parameters by unit (the model or one parameter group), and within a unit by kind (device, type, mesh)."""


class GradientClipping(L.Callback):
    r"""Clips gradients before every optimizer step, skips steps whose gradient is not finite, and reports both.

    ============== ======================================================= ==================== =======
    algorithm      what is bounded                                         ``threshold``        default
    ============== ======================================================= ==================== =======
    ``norm``       the gradient's norm, to the threshold                   norm                 1.0
    ``value``      every entry, to plus and minus the threshold            absolute value       0.5
    ``adaptive``   every unit's norm, to a share of its weights' norm      share                0.01
    ``percentile`` the norm, to a percentile of the norms so far           percentile, 0 to 100 10
    ``zscore``     a norm that stands out, towards the running mean        z-score              2.5
    ============== ======================================================= ==================== =======

    It sees the gradient the optimizer would use: whole after accumulation, reduced over ranks, over all shards under
    ``ModelParallelStrategy`` (FSDP2), and unscaled under ``precision="16-mixed"``, fused optimizers included (they get
    their gradients unscaled here rather than in their step). It works in manual optimization too.

    Logged every ``log_every_n_steps`` steps: ``grad_norm_before_clipping``, ``clip_coefficient`` (the smallest factor
    any entry was scaled by), ``clipped_share`` (of all finite steps so far), ``nonfinite_steps`` and, with
    ``reduce_lr``, ``lr_factor``; with ``per="parameter_group"`` one each per group.

    No step waits for the device if the optimizer is a fused Adam or AdamW. Any other one can only be told by the host
    to leave a step out, so there one flag per step is read back.

    Args:
        algorithm: See the table.
        threshold: See the table.
        per: Whether norms and their statistics are those of all the optimizer's parameters, or of each of its groups.
        exclude: For ``adaptive``: parameters left alone, by patterns on names (``"*.bias"``, ``"student.head.*"``).
            The paper leaves out the last layer; biases and other vectors count as one unit each unless excluded.
        eps: For ``adaptive``: floor of a unit's weight norm, so that units which start at zero can move.
        history: For ``percentile``: how many past norms count.
        warmup_steps: For ``zscore``: steps without clipping in which the first mean and variance are taken.
        decay: Of the running mean and variance (``zscore``) and of the smoothed norm that is watched.
        nonfinite: What a NaN or infinite gradient leads to. ``"skip"``: the optimizer changes nothing, neither weights
            nor its own state. ``"zero"``: the step is taken with zero gradients. ``"raise"``: an error. Under a
            GradScaler such a step is the sign to lower the scale and is always skipped, by the scaler. It is counted,
            and never enters the statistics.
        warn_norm: A smoothed norm above this for ``patience`` steps leads to a warning; None to watch nothing.
        patience: See ``warn_norm``. It is looked at every ``patience`` steps.
        reduce_lr: With each such warning, every group's learning rate is multiplied by this factor. The factor is
            applied around the optimizer's step and taken back after it, so that the schedule never sees it.

    Raises:
        ValueError: If an argument is outside its range, ``Trainer(gradient_clip_val=...)`` is set as well, the strategy
            is one that keeps the gradients to itself (FSDP1, DeepSpeed), or a pattern in ``exclude`` matches nothing.
        RuntimeError: With ``nonfinite="raise"``, on such a gradient.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_distill.callbacks import GradientClipping
        >>> clipping = GradientClipping("norm", threshold=0.1)
        >>> trainer = L.Trainer(max_steps=3, log_every_n_steps=1, callbacks=clipping, accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> trainer.callback_metrics["clipped_share"]
        tensor(1.)

    Source: Pascanu et al. 2013 (norm); Brock et al. 2021, section 4 (adaptive); Seetharaman et al. 2020 (percentile);
    Kumar et al. 2025 (zscore, with the paper's defaults).
    """

    def __init__(
        self,
        algorithm: Literal["norm", "value", "adaptive", "percentile", "zscore"] = "norm",
        threshold: float | None = None,
        *,
        per: Literal["model", "parameter_group"] = "model",
        exclude: str | Sequence[str] = (),
        eps: float = 1e-3,
        history: int = 1000,
        warmup_steps: int = 25,
        decay: float = 0.97,
        nonfinite: Literal["skip", "raise", "zero"] = "skip",
        warn_norm: float | None = 1e3,
        patience: int = 100,
        reduce_lr: float | None = None,
    ) -> None:
        super().__init__()
        _one_of("algorithm", algorithm, tuple(_DEFAULT_THRESHOLDS))
        _one_of("per", per, ("model", "parameter_group"))
        _one_of("nonfinite", nonfinite, ("skip", "raise", "zero"))
        self.algorithm, self.per, self.nonfinite = algorithm, per, nonfinite
        self.threshold = _DEFAULT_THRESHOLDS[algorithm] if threshold is None else threshold
        _between("threshold", self.threshold, 0, 100 if algorithm == "percentile" else math.inf)
        self.exclude: list[str] = [exclude] if isinstance(exclude, str) else list(exclude)
        if self.exclude and algorithm != "adaptive":
            raise ValueError(
                f"Expected argument `exclude` to be empty for algorithm {algorithm!r}, but got {exclude!r}; only "
                "'adaptive' treats parameters one by one."
            )
        self.eps = _between("eps", eps, 0, math.inf)
        self.history = _between("history", history, 0, math.inf)
        self.warmup_steps = _between("warmup_steps", warmup_steps, 0, math.inf)
        self.decay = _between("decay", decay, 0, 1)
        self.warn_norm = None if warn_norm is None else _between("warn_norm", warn_norm, 0, math.inf)
        self.patience = _between("patience", patience, 0, math.inf)
        self.reduce_lr = None if reduce_lr is None else _between("reduce_lr", reduce_lr, 0, 1)
        if reduce_lr is not None and warn_norm is None:
            raise ValueError("Expected argument `warn_norm` to be a norm where `reduce_lr` is set, but got None.")

        self.lr_factor = 1.0
        self._statistics: dict[int, dict[str, Any]] = {}
        self._units: dict[Optimizer, tuple[list[int], _Units]] = {}
        self._handles: dict[Optimizer, list[RemovableHandle]] = {}
        self._undo: dict[Optimizer, list[dict[str, Any]]] = {}

    # -- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would clip twice or see only a part of the gradient."""
        if stage != "fit":
            return
        if trainer.gradient_clip_val:
            raise ValueError(
                f"Expected argument `gradient_clip_val` of the Trainer to be left out beside GradientClipping, but got "
                f"{trainer.gradient_clip_val}; the gradient would be clipped twice."
            )
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"Expected argument `strategy` of the Trainer to leave whole gradients to callbacks, but got "
                f"{type(trainer.strategy).__name__}; use ModelParallelStrategy (FSDP2) or the strategy's own clipping."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hook the optimizers, so that a lowered learning rate holds from the first step after a resume."""
        for optimizer in trainer.optimizers:
            self._attach(pl_module, optimizer)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Clip the optimizer's gradients, or leave the step out."""
        self._attach(pl_module, optimizer)
        units = [
            [[parameter for parameter in kind if parameter.grad is not None] for kind in unit]
            for unit in self._units[optimizer][1]
        ]
        gradients = [[[parameter.grad for parameter in kind] for kind in unit] for unit in units]
        first = next((gradient for unit in gradients for kind in unit for gradient in kind), None)
        if first is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)

        norm = torch.stack([total_norm(unit).to(first.device) for unit in gradients])  # type: ignore[arg-type]
        finite = norm.isfinite().all()
        statistics = self._statistics_of(trainer, optimizer, norm)
        statistics["steps"] += 1
        coefficient = torch.zeros_like(norm)
        on_device = self._skips_on_device(optimizer)
        if on_device and scaler is None:
            self._tell(optimizer, ~finite)
        if on_device or bool(finite):
            coefficient, clipped = self._clip(units, gradients, norm, finite, statistics)
            self._count(statistics, norm, clipped, finite)
        else:
            statistics["nonfinite"] += 1
            self._leave_out(trainer, pl_module, optimizer, scaler)
        self._watch(statistics)
        if trainer.log_every_n_steps and statistics["steps"] % trainer.log_every_n_steps == 0:
            self._log(trainer, pl_module, optimizer, norm, coefficient, statistics)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the schedule its learning rate back if a step was interrupted half-way."""
        for optimizer in list(self._undo):
            self._after_step(optimizer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the hooks off the optimizers."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles, self._units, self._undo = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Statistics of every optimizer and the learning-rate factor; tensors, numbers and strings."""
        statistics = {
            index: {name: value.clone() if isinstance(value, Tensor) else value for name, value in of_one.items()}
            for index, of_one in self._statistics.items()
        }
        return {"lr_factor": self.lr_factor, "statistics": statistics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the statistics of a checkpoint."""
        self.lr_factor = state_dict["lr_factor"]
        self._statistics = {index: dict(of_one) for index, of_one in state_dict["statistics"].items()}

    # -- clipping ----------------------------------------------------------------------------------------------------

    def _clip(
        self, units: _Units, gradients: list[Any], norm: Tensor, finite: Tensor, statistics: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Clip in place; the smallest factor applied and whether anything was clipped, by unit."""
        if self.algorithm == "adaptive":
            coefficient = torch.stack([clip_adaptively_(unit, self.threshold, self.eps) for unit in units])
            coefficient = coefficient.to(norm.device)
            if any(isinstance(parameter, DTensor) for unit in units for kind in unit for parameter in kind):
                torch.distributed.all_reduce(coefficient, torch.distributed.ReduceOp.MIN)
            return coefficient, coefficient < 1
        if self.algorithm == "value":
            largest = torch.stack([total_norm(unit, math.inf).to(norm.device) for unit in gradients])
            clipped = largest > self.threshold
            if not _known(~clipped):
                for unit in gradients:
                    clip_by_value_(unit, self.threshold)
            return (self.threshold / largest).clamp(max=1.0), clipped
        max_norm = self._max_norm(norm, finite, statistics)
        coefficient = norm_coefficient(norm, max_norm)
        if not _known(coefficient >= 1):
            for unit, factor in zip(gradients, coefficient.unbind(), strict=True):
                scale_(unit, factor)
        return coefficient, norm > max_norm

    def _max_norm(self, norm: Tensor, finite: Tensor, statistics: dict[str, Any]) -> Tensor | float:
        if self.algorithm == "norm":
            return self.threshold
        count = statistics["count"]
        if self.algorithm == "percentile":
            history, place = statistics["history"], count.reshape(1) % self.history
            row = torch.where(finite, norm, history.index_select(0, place))
            history.index_copy_(0, place, row)
            return percentile_threshold(history, self.threshold)
        mean, variance = statistics["mean"], statistics["variance"]
        warming_up = count < self.warmup_steps
        max_norm = torch.where(warming_up, math.inf, zscore_threshold(norm, mean, variance, self.threshold))
        # One update for both phases: with weight 1/n it is Welford's for the plain mean and variance.
        weight = torch.where(warming_up, 1 / (count + 1), 1 - self.decay)
        value = norm.minimum(max_norm)
        new_mean = mean + weight * (value - mean)
        distance = torch.where(warming_up, value - mean, value - new_mean)
        new_variance = (1 - weight) * variance + weight * (value - new_mean) * distance
        mean.copy_(torch.where(finite, new_mean, mean))
        variance.copy_(torch.where(finite, new_variance, variance))
        return max_norm

    def _count(self, statistics: dict[str, Any], norm: Tensor, clipped: Tensor, finite: Tensor) -> None:
        statistics["count"] += finite
        statistics["nonfinite"] += ~finite
        statistics["clipped"] += clipped & finite
        if self.warn_norm is not None:
            smoothed = statistics["smoothed"]
            new = torch.where(smoothed.isnan(), norm, torch.lerp(norm, smoothed, self.decay))
            smoothed.copy_(torch.where(finite, new, smoothed))
            above = statistics["above"]
            above.add_(1).mul_(smoothed > self.warn_norm)

    # -- steps left out ----------------------------------------------------------------------------------------------

    def _skips_on_device(self, optimizer: Optimizer) -> bool:
        # These read `found_inf` in their kernel. Fused SGD does too, but leaves its momentum uninitialised if the very
        # first step is skipped.
        fused = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and optimizer.defaults.get("fused")
        return self.nonfinite == "skip" and bool(fused)

    def _tell(self, optimizer: Optimizer, skip: Tensor) -> None:
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        forget: RemovableHandle

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            del optimizer.found_inf  # type: ignore[attr-defined]
            forget.remove()

        forget = optimizer.register_step_post_hook(after_step)

    def _leave_out(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, scaler: Any) -> None:
        if self.nonfinite == "raise" and (scaler is None or scaler.get_scale() < 1):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            broken = {id(p) for p in parameters if p.grad is not None and not p.grad.isfinite().all()}
            names = [name for name, parameter in pl_module.named_parameters() if id(parameter) in broken]
            raise RuntimeError(
                f"Expected finite gradients at step {trainer.global_step}, but got NaN or infinity in "
                f"{len(names)} parameters, the first {names[:3]}. Lower the learning rate, or choose nonfinite='skip'."
            )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if self.nonfinite == "zero" and parameter.grad is not None:
                    parameter.grad.zero_()
                elif self.nonfinite != "zero":
                    parameter.grad = None
        if self.nonfinite != "zero" and scaler is None:
            # Without gradients the step touches no parameter, but some optimizers count steps in their groups.
            kept = self._undo.get(optimizer, [{} for _ in optimizer.param_groups])
            self._undo[optimizer] = [
                {**{name: value for name, value in group.items() if name != "params"}, **earlier}
                for group, earlier in zip(optimizer.param_groups, kept, strict=True)
            ]

    # -- watching the norm -------------------------------------------------------------------------------------------

    def _watch(self, statistics: dict[str, Any]) -> None:
        if self.warn_norm is None or statistics["steps"] % self.patience or statistics["above"].max() < self.patience:
            return
        advice = "lower it" if self.reduce_lr is None else f"it is multiplied by {self.reduce_lr} from here on"
        rank_zero_warn(
            f"The smoothed gradient norm has been above warn_norm={self.warn_norm:g} for {self.patience} steps (now "
            f"{statistics['smoothed'].max():.3g}). The learning rate may be too high: {advice}."
        )
        statistics["above"].zero_()
        self.lr_factor *= self.reduce_lr or 1.0

    def _before_step(self, optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
        if self.lr_factor != 1.0:
            self._undo[optimizer] = [{"lr": group["lr"]} for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.lr_factor

    def _after_step(self, optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
        for group, values in zip(optimizer.param_groups, self._undo.pop(optimizer, ()), strict=False):
            group.update(values)

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def _attach(self, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Group the optimizer's parameters and hook its step, once and again when parameters were added."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if optimizer in self._units and self._units[optimizer][0] == sizes:
            return
        units = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        if self.exclude:
            left_alone = self._left_alone(pl_module)
            units = [[parameter for parameter in unit if id(parameter) not in left_alone] for unit in units]
        if self.per == "model":
            units = [[parameter for unit in units for parameter in unit]]
        self._units[optimizer] = sizes, [group_tensors(unit) for unit in units]  # type: ignore[misc]
        if optimizer not in self._handles:
            self._handles[optimizer] = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def _left_alone(self, pl_module: L.LightningModule) -> set[int]:
        named = dict(pl_module.named_parameters())
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ValueError(
                    f"Expected argument `exclude` to match names of parameters, but got {pattern!r}, which matches "
                    f"none; the names look like {next(iter(named), None)!r}."
                )
        return {id(p) for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in self.exclude)}

    def _statistics_of(self, trainer: L.Trainer, optimizer: Optimizer, norm: Tensor) -> dict[str, Any]:
        index = trainer.optimizers.index(optimizer)
        if index not in self._statistics:
            zeros = torch.zeros_like(norm)
            new: dict[str, Any] = {"steps": 0, "count": zeros[0].long(), "nonfinite": zeros[0].long()}
            new |= {"clipped": zeros.long(), "above": zeros.long(), "smoothed": zeros + math.nan}
            if self.algorithm == "percentile":
                new["history"] = norm.new_full((self.history, len(norm)), math.nan)
            if self.algorithm == "zscore":
                new |= {"mean": zeros.clone(), "variance": zeros.clone()}
            self._statistics[index] = new
        statistics = self._statistics[index]
        if statistics["count"].device != norm.device:
            statistics |= {name: v.to(norm.device) for name, v in statistics.items() if isinstance(v, Tensor)}
        return statistics

    def _log(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: Optimizer,
        norm: Tensor,
        coefficient: Tensor,
        statistics: dict[str, Any],
    ) -> None:
        several = f"/optimizer{trainer.optimizers.index(optimizer)}" if len(trainer.optimizers) > 1 else ""
        values = {f"nonfinite_steps{several}": statistics["nonfinite"].float()}
        if self.reduce_lr is not None:
            values["lr_factor"] = torch.tensor(self.lr_factor)
        share = statistics["clipped"] / statistics["count"].clamp(min=1)
        for index, group in enumerate(optimizer.param_groups[: len(norm)]):
            name = several if self.per == "model" else f"{several}/{group.get('name', f'group{index}')}"
            values[f"grad_norm_before_clipping{name}"] = norm[index]
            values[f"clip_coefficient{name}"] = coefficient[index]
            values[f"clipped_share{name}"] = share[index]
        pl_module.log_dict(values)


def _known(condition: Tensor) -> bool:
    """Whether a condition holds everywhere, where that can be seen without waiting for a device."""
    return condition.is_cpu and bool(condition.all())


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Expected argument `{name}` to be one of {choices}, but got {value!r}.")


def _between(name: str, value: Any, low: float, high: float) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected argument `{name}` to be a number, but got {value!r}.")
    if not low < value <= high or (math.isinf(high) and math.isinf(value)):
        raise ValueError(f"Expected argument `{name}` to be above {low:g} and at most {high:g}, but got {value!r}.")
    return value
