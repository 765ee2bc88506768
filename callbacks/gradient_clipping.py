"""GradientClipping: five ways to bound a gradient before the optimizer's step."""

import copy
import itertools
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_distill.arguments import between, one_of, typed
from lightning_distill.functional import clipping

_DEFAULT_THRESHOLDS = {"norm": 1.0, "value": 0.5, "adaptive": 0.01, "percentile": 10.0, "zscore": 2.5}
_LOOK_EVERY = 50  # steps, by `value` where nothing is logged: as often as Lightning logs by default
_Units = list[list[list[Tensor]]]  # by unit (the model or one parameter group), and within a unit by kind


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

    ``value`` needs no norm, which is then computed on the logged steps only: the share of clipped steps is theirs, and
    ``warn_norm`` looks at them. No step waits for the device if the optimizer is a fused Adam or AdamW; any other can
    only be told by the host to leave a step out, so there one flag per step is read back.

    Args:
        algorithm: See the table.
        threshold: See the table.
        per: Whether norms and their statistics are those of all the optimizer's parameters, or of each of its groups.
        exclude: For ``adaptive``: parameters left alone, by patterns on names (``"*.bias"``, ``"student.head.*"``).
            The paper leaves out the last layer; biases and other vectors count as one unit each unless excluded.
        eps: For ``adaptive``: floor of a unit's weight norm, so that units which start at zero can move.
        history: For ``percentile``: how many past norms count.
        warmup_steps: For ``zscore``: steps in which the first mean and variance are taken.
        spike_factor: Multiple of the median of the norms so far that bounds a norm where ``zscore`` (in its warm-up)
            and ``percentile`` (in its first steps; near 100 in later ones too) have no statistics yet that one step
            could not move. The very first step is bounded by 1. None leaves all of these alone, as the papers do.
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
        >>> from lightning_distill.callbacks import GradientClipping
        >>> trainer = L.Trainer(callbacks=GradientClipping("norm", threshold=0.1), accelerator="cpu", logger=False)

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
        one_of("clip_option", clip_option, ("adaptive_scaling", "mean"))
        threshold = _DEFAULT_THRESHOLDS[algorithm] if threshold is None else threshold
        between("threshold", threshold, 0, 100 if algorithm == "percentile" else math.inf)
        positive: dict[str, float | None] = {"eps": eps, "history": history, "warmup_steps": warmup_steps}
        positive |= {"spike_factor": spike_factor, "clip_factor": clip_factor, "max_grad_norm": max_grad_norm}
        positive |= {"warn_norm": warn_norm, "patience": patience, "decay": decay, "reduce_lr": reduce_lr}
        for name, value in positive.items():
            if value is not None:
                between(name, value, 0, 1 if name in ("decay", "reduce_lr") else math.inf)
        if reduce_lr is not None and warn_norm is None:
            raise ValueError("Expected argument `warn_norm` to be a norm where `reduce_lr` is set, but got None.")
        cuts = (clip_option, clip_factor, skip_update_on_spike) != ("adaptive_scaling", 1.0, False)
        for name, given, of in (
            ("exclude", bool(exclude), "adaptive"),
            ("clip_option`, `clip_factor` and `skip_update_on_spike", cuts, "zscore"),
            ("max_grad_norm", max_grad_norm is not None, "zscore, percentile"),
        ):
            if given and algorithm not in of:
                raise ValueError(
                    f"Expected argument `{name}` to be left out for {algorithm!r}, but got a value; it is for {of}."
                )

        self.algorithm, self.threshold, self.per, self.nonfinite = algorithm, threshold, per, nonfinite
        self.exclude: list[str] = [exclude] if isinstance(exclude, str) else list(exclude)
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
            [
                [gradient for parameter in kind if (gradient := clipping.gradient_of(parameter)) is not None]
                for kind in unit
            ]
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
        norm = None
        if self.algorithm != "value" or statistics["steps"] % every == 0:
            norm = torch.stack([clipping.total_norm(unit).to(first.device) for unit in gradients])
        finite = clipping.all_finite([*itertools.chain(*gradients)]) if norm is None else norm.isfinite().all()
        # These read `found_inf` in their kernel; fused SGD does too, but leaves its momentum uninitialised if the very
        # first step is skipped.
        fused = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and optimizer.defaults.get("fused")
        on_device = self.nonfinite == "skip" and fused
        if on_device and scaler is None:
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self._flagged.add(optimizer)
        statistics["nonfinite"] += ~finite
        clip = None
        if on_device or bool(finite):
            clip = self._clip(units, gradients, norm, finite, statistics)
        else:
            self._leave_out(trainer, pl_module, optimizer, scaler)
        if norm is not None and clip is not None:
            self._count(statistics, norm, clip[1], finite, 1 if self.algorithm != "value" else every)
        self._watch(statistics)
        if norm is not None and trainer.log_every_n_steps and statistics["steps"] % every == 0:  # type: ignore[attr-defined]
            self._log(trainer, pl_module, optimizer, norm, torch.zeros_like(norm) if clip is None else clip[0])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the schedule its learning rate back if a step was interrupted half-way."""
        for optimizer in {*self._undo, *self._flagged}:
            self._after_step(optimizer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the hooks off the optimizers."""
        for handle in itertools.chain(*self._handles.values()):
            handle.remove()
        self._handles, self._units, self._undo = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The learning-rate factor and every optimizer's statistics: numbers and tensors."""
        return {"lr_factor": self.lr_factor, "statistics": copy.deepcopy(self._statistics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the statistics of a checkpoint."""
        self.lr_factor, self._statistics = state_dict["lr_factor"], copy.deepcopy(state_dict["statistics"])

    def _clip(
        self, units: _Units, gradients: _Units, norm: Tensor | None, finite: Tensor, statistics: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """Clip in place; by unit, the norm after over the norm before, and whether anything was clipped."""
        if norm is not None and self.algorithm not in ("value", "adaptive"):
            max_norm = self._max_norm(norm, finite, statistics)
            coefficient = clipping.norm_coefficient(norm, max_norm)
            if not _known(coefficient >= 1):
                for unit, factor in zip(gradients, coefficient.unbind(), strict=True):
                    clipping.scale_(unit, factor)
            return coefficient, norm > max_norm
        if self.algorithm == "value" and norm is not None and _known(norm <= self.threshold):
            return torch.ones_like(norm), norm > self.threshold  # no entry is larger than the norm
        for unit, of_unit in zip(units, gradients, strict=True):
            if self.algorithm == "value":
                clipping.clip_by_value_(of_unit, self.threshold)
            else:
                chosen = [[p for p in kind if p.grad is not None and id(p) not in self._excluded] for kind in unit]
                clipping.clip_adaptively_(chosen, self.threshold, self.eps)
        if norm is None:
            return None
        after = torch.stack([clipping.total_norm(unit).to(norm.device) for unit in gradients])
        return torch.where(norm > 0, after / norm, 1.0), after < norm

    def _max_norm(self, norm: Tensor, finite: Tensor, statistics: dict[str, Any]) -> Tensor | float:
        if self.algorithm == "norm":
            return self.threshold
        if self.algorithm == "percentile":
            bound = clipping.percentile_bound(norm, finite, statistics, self.threshold, self.spike_factor)
        else:
            bound = clipping.zscore_bound(
                norm, finite, statistics, self.threshold, self.spike_factor, self.decay,
                self.clip_option, self.clip_factor, self.skip_update_on_spike,
            )  # fmt: skip
        return bound if self.max_grad_norm is None else bound.clamp(max=self.max_grad_norm)

    def _count(self, statistics: dict[str, Any], norm: Tensor, clipped: Tensor, finite: Tensor, steps: int) -> None:
        """Take one norm into the statistics; it stands for that many steps."""
        statistics["count"] += finite
        statistics["clipped"] += clipped & finite
        if self.warn_norm is not None:
            smoothed = statistics["smoothed"]
            new = torch.where(smoothed.isnan(), norm, torch.lerp(norm, smoothed, self.decay))
            smoothed.copy_(torch.where(finite, new, smoothed))
            statistics["above"].add_(finite * steps).mul_(smoothed > self.warn_norm)

    def _leave_out(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, scaler: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.nonfinite == "raise" and (scaler is None or scaler.get_scale() < 1):
            held = {id(parameter): clipping.gradient_of(parameter) for parameter in parameters}
            named = ((name, held.get(id(parameter))) for name, parameter in pl_module.named_parameters())
            names = [name for name, gradient in named if gradient is not None and not gradient.isfinite().all()]
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
            before = optimizer.register_step_pre_hook(self._before_step)
            self._handles[optimizer] = [before, optimizer.register_step_post_hook(self._after_step)]

    def _units_of(self, pl_module: L.LightningModule, optimizer: Optimizer) -> _Units:
        """The optimizer's parameters in units, put together once and again when some were added."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if optimizer not in self._units or self._units[optimizer][0] != sizes:
            # Not before a backward: until then FSDP2 may show whole parameters in place of the optimizer's shards.
            named = dict(pl_module.named_parameters())
            for pattern in self.exclude:
                matching = [name for name in named if fnmatchcase(name, pattern)]
                if not matching:
                    raise ValueError(
                        f"Expected argument `exclude` to match names of parameters, but got {pattern!r}, which matches "
                        f"none; the names look like {next(iter(named), None)!r}."
                    )
                self._excluded |= {id(named[name]) for name in matching}
            units = [list(group["params"]) for group in optimizer.param_groups]
            units = [[*itertools.chain(*units)]] if self.per == "model" else units
            self._units[optimizer] = sizes, [clipping.group_tensors(unit) for unit in units]
        return self._units[optimizer][1]

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
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, norm: Tensor, coefficient: Tensor
    ) -> None:
        index = _index(trainer, optimizer)
        statistics, suffix = self._statistics[index], f"/optimizer{index}" if len(trainer.optimizers) > 1 else ""
        values = {f"nonfinite_steps{suffix}": statistics["nonfinite"].float()}
        if self.reduce_lr is not None:
            values["lr_factor"] = torch.tensor(self.lr_factor)
        names = [suffix]
        if self.per == "parameter_group":
            groups = enumerate(optimizer.param_groups)
            names = [f"{suffix}/{group.get('name', f'group{number}')}" for number, group in groups]
        share = statistics["clipped"] / statistics["count"].clamp(min=1)
        for quantity, by_unit in (("grad_norm", norm), ("clip_coefficient", coefficient), ("clipped_share", share)):
            values |= {f"{quantity}{name}": value for name, value in zip(names, by_unit.unbind(), strict=True)}
        pl_module.log_dict(values)


def _index(trainer: L.Trainer, optimizer: Optimizer) -> int:
    # An optimizer built for a while by someone else (a range test) stands for the first one.
    return next((index for index, known in enumerate(trainer.optimizers) if known is optimizer), 0)


def _known(condition: Tensor) -> bool:
    """Whether a condition holds everywhere, where that can be seen without waiting for a device."""
    return condition.is_cpu and bool(condition.all())
