"""GradientClipping: five ways to bound a gradient before the optimizer's step."""

import copy
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_distill.arguments import between, one_of, typed
from lightning_distill.functional.clipping import (
    all_finite,
    clip_adaptively_,
    clip_by_value_,
    gradient_of,
    group_tensors,
    norm_coefficient,
    percentile_threshold,
    running_moments,
    scale_,
    spike_threshold,
    total_norm,
    zscore_threshold,
)

_DEFAULT_THRESHOLDS = {"norm": 1.0, "value": 0.5, "adaptive": 0.01, "percentile": 10.0, "zscore": 2.5}
_LOOK_EVERY = 50
"""How often ``value`` looks at the norm where nothing is logged: as often as Lightning logs by default."""
_Units = list[list[list[nn.Parameter]]]
"""Parameters by unit (the model or one parameter group), and within a unit by kind (device, type, mesh)."""


@typed
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

    Logged every ``log_every_n_steps`` steps: ``grad_norm`` (before clipping), ``clip_coefficient`` (the norm
    after over the norm before), ``clipped_share`` (of all finite steps so far), ``nonfinite_steps`` and, with
    ``reduce_lr``, ``lr_factor``; with ``per="parameter_group"`` one each per group.

    One norm is computed a step. ``value`` needs none, so there it is computed on the logged steps only: the share of
    clipped steps is that of the logged ones, and ``warn_norm`` looks at those.

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
        warmup_steps: For ``zscore``: steps in which the first mean and variance are taken.
        spike_factor: Where ``zscore`` and ``percentile`` have no statistics yet that one step could not move, the norm
            is bounded by this multiple of the median of the norms so far: in the warm-up; in the first steps (and, for
            a percentile near 100, the later ones), of which the percentile is the largest. The very first step, which
            has no past, is bounded by 1. None leaves all of these alone, as the papers do.
        clip_option: For ``zscore``: what a norm that stands out is cut to, ``"adaptive_scaling"`` (the further out, the
            closer to the mean) or ``"mean"``.
        clip_factor: For ``zscore``: factor of the adaptive bound; below 1 it cuts more.
        skip_update_on_spike: For ``zscore``: whether a norm that stands out leaves mean and variance as they are.
        max_grad_norm: For ``zscore`` and ``percentile``: a fixed bound on top.
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
    Kumar et al. 2025 (zscore, with the paper's defaults; its options as in the authors' code).
    """

    #: It looks for NaN and infinity and logs the norm, so that nobody else does.
    checks_gradients = True

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
        spike_factor: float | None = 3.0,
        clip_option: Literal["adaptive_scaling", "mean"] = "adaptive_scaling",
        clip_factor: float = 1.0,
        skip_update_on_spike: bool = False,
        max_grad_norm: float | None = None,
        decay: float = 0.97,
        nonfinite: Literal["skip", "raise", "zero"] = "skip",
        warn_norm: float | None = 1e3,
        patience: int = 100,
        reduce_lr: float | None = None,
    ) -> None:
        super().__init__()
        one_of("algorithm", algorithm, _DEFAULT_THRESHOLDS)
        one_of("per", per, ("model", "parameter_group"))
        one_of("nonfinite", nonfinite, ("skip", "raise", "zero"))
        self.algorithm, self.per, self.nonfinite = algorithm, per, nonfinite
        self.threshold = _DEFAULT_THRESHOLDS[algorithm] if threshold is None else threshold
        between("threshold", self.threshold, 0, 100 if algorithm == "percentile" else math.inf)
        self.exclude: list[str] = [exclude] if isinstance(exclude, str) else list(exclude)
        if self.exclude and algorithm != "adaptive":
            raise ValueError(
                f"Expected argument `exclude` to be empty for algorithm {algorithm!r}, but got {exclude!r}; only "
                "'adaptive' treats parameters one by one."
            )
        positive = {"eps": eps, "history": history, "warmup_steps": warmup_steps, "patience": patience}
        for name, value in positive.items():
            between(name, value, 0)
        between("decay", decay, 0, 1)
        one_of("clip_option", clip_option, ("adaptive_scaling", "mean"))
        between("clip_factor", clip_factor, 0)
        for name, bound in (("spike_factor", spike_factor), ("max_grad_norm", max_grad_norm)):
            if bound is not None:
                between(name, bound, 0)
        changed = (clip_option, clip_factor, skip_update_on_spike) != ("adaptive_scaling", 1.0, False)
        for name, wrong, of in (
            ("clip_option`, `clip_factor` and `skip_update_on_spike", changed, ("zscore",)),
            ("max_grad_norm", max_grad_norm is not None, ("zscore", "percentile")),
        ):
            if wrong and algorithm not in of:
                raise ValueError(
                    f"Expected argument `{name}` to be left out for algorithm {algorithm!r}, but got a value; it is "
                    f"for {' and '.join(map(repr, of))}."
                )
        if warn_norm is not None:
            between("warn_norm", warn_norm, 0)
        if reduce_lr is not None:
            between("reduce_lr", reduce_lr, 0, 1)
        if reduce_lr is not None and warn_norm is None:
            raise ValueError("Expected argument `warn_norm` to be a norm where `reduce_lr` is set, but got None.")

        self.eps, self.history, self.warmup_steps, self.decay = eps, history, warmup_steps, decay
        self.spike_factor, self.max_grad_norm = spike_factor, max_grad_norm
        self.clip_option, self.clip_factor, self.skip_update_on_spike = clip_option, clip_factor, skip_update_on_spike
        self.warn_norm, self.patience, self.reduce_lr = warn_norm, patience, reduce_lr

        self.lr_factor = 1.0
        self._statistics: dict[int, dict[str, Any]] = {}
        self._excluded: set[int] = set()
        self._units: dict[Optimizer, tuple[list[int], _Units]] = {}
        self._handles: dict[Optimizer, list[RemovableHandle]] = {}
        self._undo: dict[Optimizer, list[dict[str, Any]]] = {}
        self._flagged: set[Optimizer] = set()

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
            self._hook(optimizer)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Clip the optimizer's gradients, or leave the step out."""
        self._hook(optimizer)
        units = self._units_of(pl_module, optimizer)
        gradients = [
            [[gradient for parameter in kind if (gradient := gradient_of(parameter)) is not None] for kind in unit]
            for unit in units
        ]
        first = next((gradient for unit in gradients for kind in unit for gradient in kind), None)
        if first is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)

        statistics = self._statistics_of(trainer, optimizer, len(units), first)
        statistics["steps"] += 1
        every = trainer.log_every_n_steps or _LOOK_EVERY  # type: ignore[attr-defined]
        looks = self.algorithm != "value" or statistics["steps"] % every == 0
        norm = coefficient = None
        if looks:
            norm = torch.stack([total_norm(unit).to(first.device) for unit in gradients])
            coefficient = torch.zeros_like(norm)
        finite = all_finite([kind for unit in gradients for kind in unit]) if norm is None else norm.isfinite().all()
        on_device = self._skips_on_device(optimizer)
        if on_device and scaler is None:
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self._flagged.add(optimizer)
        if on_device or bool(finite):
            coefficient, clipped = self._clip(units, gradients, norm, finite, statistics)
            statistics["nonfinite"] += ~finite
            if norm is not None and clipped is not None:
                self._count(statistics, norm, clipped, finite, 1 if self.algorithm != "value" else every)
        else:
            statistics["nonfinite"] += 1
            self._leave_out(trainer, pl_module, optimizer, scaler)
        self._watch(statistics)
        if trainer.log_every_n_steps and statistics["steps"] % every == 0:  # type: ignore[attr-defined]
            share = statistics["clipped"] / statistics["count"].clamp(min=1)
            assert norm is not None
            assert coefficient is not None
            logged = {"grad_norm": norm, "clip_coefficient": coefficient, "clipped_share": share}
            self._log(trainer, pl_module, optimizer, logged)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the schedule its learning rate back if a step was interrupted half-way."""
        for optimizer in {*self._undo, *self._flagged}:
            self._after_step(optimizer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the hooks off the optimizers."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles, self._units, self._undo = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The learning-rate factor and every optimizer's statistics: numbers and tensors."""
        return {"lr_factor": self.lr_factor, "statistics": copy.deepcopy(self._statistics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the statistics of a checkpoint."""
        self.lr_factor, self._statistics = state_dict["lr_factor"], copy.deepcopy(state_dict["statistics"])

    def _clip(
        self,
        units: _Units,
        gradients: list[list[list[Tensor]]],
        norm: Tensor | None,
        finite: Tensor,
        statistics: dict[str, Any],
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Clip in place; by unit, the norm after over the norm before, and whether anything was clipped."""
        if norm is None:
            for unit in gradients:
                clip_by_value_(unit, self.threshold)
            return None, None
        if self.algorithm in ("value", "adaptive"):
            if self.algorithm == "adaptive":
                for parameters in units:
                    chosen = [
                        [p for p in kind if p.grad is not None and id(p) not in self._excluded] for kind in parameters
                    ]
                    clip_adaptively_(chosen, self.threshold, self.eps)
            elif not _known(norm <= self.threshold):  # no entry is larger than the norm
                for unit in gradients:
                    clip_by_value_(unit, self.threshold)
            else:
                return torch.ones_like(norm), torch.zeros_like(norm, dtype=torch.bool)
            after = torch.stack([total_norm(unit).to(norm.device) for unit in gradients])
            return torch.where(norm > 0, after / norm, 1.0), after < norm
        max_norm = self._max_norm(norm, finite, statistics)
        coefficient = norm_coefficient(norm, max_norm)
        if not _known(coefficient >= 1):
            for unit, factor in zip(gradients, coefficient.unbind(), strict=True):
                scale_(unit, factor)
        return coefficient, norm > max_norm

    def _max_norm(self, norm: Tensor, finite: Tensor, statistics: dict[str, Any]) -> Tensor | float:
        if self.algorithm == "norm":
            return self.threshold
        find = self._percentile_bound if self.algorithm == "percentile" else self._zscore_bound
        bound = find(norm, finite, statistics)
        return bound if self.max_grad_norm is None else bound.clamp(max=self.max_grad_norm)

    def _percentile_bound(self, norm: Tensor, finite: Tensor, statistics: dict[str, Any]) -> Tensor:
        history, count = statistics["history"], statistics["count"]
        spike = None if self.spike_factor is None else spike_threshold(history, self.spike_factor)
        _write(history, count % self.history, norm, finite)
        bound = percentile_threshold(history, self.threshold)
        if spike is None:
            return bound
        # Of few norms, the percentile lies above all but the largest, which may be this one.
        held = (count + 1).clamp(max=self.history)
        return torch.where(self.threshold / 100 * (held - 1) > held - 2, bound.minimum(spike), bound)

    def _zscore_bound(self, norm: Tensor, finite: Tensor, statistics: dict[str, Any]) -> Tensor:
        mean, variance, count, past = (statistics[name] for name in ("mean", "variance", "count", "past"))
        warming_up = count < self.warmup_steps
        spike = (
            torch.full_like(norm, math.inf) if self.spike_factor is None else spike_threshold(past, self.spike_factor)
        )
        bound = zscore_threshold(norm, mean, variance, self.threshold, option=self.clip_option, factor=self.clip_factor)
        bound = torch.where(warming_up, spike, bound)
        _write(past, count.clamp(max=self.warmup_steps - 1), norm, finite & warming_up)
        # All norms of the warm-up weigh the same, and none more than what a spike is cut to.
        first = past if self.spike_factor is None else past.minimum(spike_threshold(past, self.spike_factor))
        first_mean = first.nanmean(0)
        plain = first_mean, (first - first_mean).square().nanmean(0)
        decaying = running_moments(norm.minimum(bound), mean, variance, count, 0, self.decay)
        update = finite & (warming_up | ~((norm > bound) & self.skip_update_on_spike))
        for old, early, late in zip((mean, variance), plain, decaying, strict=True):
            old.copy_(torch.where(update, torch.where(warming_up, early, late), old))
        return bound

    def _count(self, statistics: dict[str, Any], norm: Tensor, clipped: Tensor, finite: Tensor, steps: int) -> None:
        """Take one norm into the statistics; it stands for that many steps."""
        statistics["count"] += finite
        statistics["clipped"] += clipped & finite
        if self.warn_norm is not None:
            smoothed = statistics["smoothed"]
            new = torch.where(smoothed.isnan(), norm, torch.lerp(norm, smoothed, self.decay))
            smoothed.copy_(torch.where(finite, new, smoothed))
            statistics["above"].add_(finite * steps).mul_(smoothed > self.warn_norm)

    def _skips_on_device(self, optimizer: Optimizer) -> bool:
        # These read `found_inf` in their kernel. Fused SGD does too, but leaves its momentum uninitialised if the very
        # first step is skipped.
        fused = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and optimizer.defaults.get("fused")
        return self.nonfinite == "skip" and bool(fused)

    def _leave_out(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, scaler: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.nonfinite == "raise" and (scaler is None or scaler.get_scale() < 1):
            broken = {id(p) for p in parameters if (found := gradient_of(p)) is not None and not found.isfinite().all()}
            names = [name for name, parameter in pl_module.named_parameters() if id(parameter) in broken]
            raise RuntimeError(
                f"Expected finite gradients at step {trainer.global_step}, but got NaN or infinity in "
                f"{len(names)} parameters, the first {names[:3]}. Lower the learning rate, or choose nonfinite='skip'."
            )
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter.grad) if self.nonfinite == "zero" else None
        if self.nonfinite != "zero" and scaler is None:
            # Without gradients the step touches no parameter, but some optimizers count steps in their groups.
            kept = self._undo.get(optimizer, [{} for _ in optimizer.param_groups])
            self._undo[optimizer] = [
                {**{name: value for name, value in group.items() if name != "params"}, **earlier}
                for group, earlier in zip(optimizer.param_groups, kept, strict=True)
            ]

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
        if optimizer in self._flagged:
            self._flagged.remove(optimizer)
            del optimizer.found_inf  # type: ignore[attr-defined]

    def _hook(self, optimizer: Optimizer) -> None:
        if optimizer not in self._handles:
            self._handles[optimizer] = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def _units_of(self, pl_module: L.LightningModule, optimizer: Optimizer) -> _Units:
        """The optimizer's parameters in units, put together once and again when some were added."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if optimizer not in self._units or self._units[optimizer][0] != sizes:
            # Not before a backward: until then FSDP2 may show whole parameters in place of the optimizer's shards.
            self._excluded = self._find_excluded(pl_module)
            units = [list(group["params"]) for group in optimizer.param_groups]
            if self.per == "model":
                units = [[parameter for unit in units for parameter in unit]]
            self._units[optimizer] = sizes, [group_tensors(unit) for unit in units]  # type: ignore[misc]
        return self._units[optimizer][1]

    def _find_excluded(self, pl_module: L.LightningModule) -> set[int]:
        named = dict(pl_module.named_parameters())
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ValueError(
                    f"Expected argument `exclude` to match names of parameters, but got {pattern!r}, which matches "
                    f"none; the names look like {next(iter(named), None)!r}."
                )
        return {id(p) for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in self.exclude)}

    def _statistics_of(self, trainer: L.Trainer, optimizer: Optimizer, units: int, like: Tensor) -> dict[str, Any]:
        index = _index(trainer, optimizer)
        if index not in self._statistics:
            zeros = torch.zeros(units, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
            new: dict[str, Any] = {"steps": 0, "count": zeros[0].long(), "nonfinite": zeros[0].long()}
            new |= {"clipped": zeros.long(), "above": zeros.long(), "smoothed": zeros + math.nan}
            if self.algorithm == "zscore":
                new |= {"mean": zeros.clone(), "variance": zeros.clone()}
                new["past"] = zeros.new_full((self.warmup_steps, units), math.nan)
            if self.algorithm == "percentile":
                new["history"] = zeros.new_full((self.history, units), math.nan)
            self._statistics[index] = new
        statistics = self._statistics[index]
        if statistics["count"].device != like.device:
            statistics |= {name: v.to(like.device) for name, v in statistics.items() if isinstance(v, Tensor)}
        return statistics

    def _log(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, by_unit: dict[str, Tensor]
    ) -> None:
        index = _index(trainer, optimizer)
        suffix = f"/optimizer{index}" if len(trainer.optimizers) > 1 else ""
        values = {f"nonfinite_steps{suffix}": self._statistics[index]["nonfinite"].float()}
        if self.reduce_lr is not None:
            values["lr_factor"] = torch.tensor(self.lr_factor)
        names = [suffix]
        if self.per == "parameter_group":
            groups = enumerate(optimizer.param_groups)
            names = [f"{suffix}/{group.get('name', f'group{number}')}" for number, group in groups]
        for quantity, tensor in by_unit.items():
            values |= {f"{quantity}{name}": value for name, value in zip(names, tensor.unbind(), strict=True)}
        pl_module.log_dict(values)


def _index(trainer: L.Trainer, optimizer: Optimizer) -> int:
    # An optimizer built for a while by someone else (a range test) stands for the first one.
    return next((index for index, known in enumerate(trainer.optimizers) if known is optimizer), 0)


def _write(past: Tensor, place: Tensor, norm: Tensor, when: Tensor) -> None:
    """Put norms into a row of those of the past, without waiting for a device."""
    place = place.reshape(1)
    past.index_copy_(0, place, torch.where(when, norm, past.index_select(0, place)))


def _known(condition: Tensor) -> bool:
    """Whether a condition holds everywhere, where that can be seen without waiting for a device."""
    return condition.is_cpu and bool(condition.all())
