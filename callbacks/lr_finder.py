"""LRFinder: a learning-rate range test before training, and the learning rate it suggests under any schedule."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor

from lightning_distill.arguments import between, one_of, typed
from lightning_distill.functional.range_test import Suggestion, lr_suggestion, smooth_losses, trim_curve
from lightning_distill.optim.peak_lr import peak_lrs, scale_peak_lrs, set_lr
from lightning_distill.optim.recommended import LRRange
from lightning_distill.training.dry_run import available_host_memory, dry_run, num_bytes, stateful_parts


@typed
class LRFinder(L.Callback):
    """Finds a learning rate in a short sweep before training, and trains with it.

    For ``num_steps`` optimizer steps the learning rate rises from ``min_lr`` to ``max_lr`` while the loss is recorded,
    averaged over ranks and accumulated batches; the sweep ends early once the smoothed loss has diverged. Then all is
    put back as it was, bit for bit: weights, optimizers, random generators, the loader's position, other callbacks,
    counters, the gradient scaler, loggers. The sweep goes through the Trainer's own loop, so precision, strategy,
    accumulation and manual optimization are those of the training to come.

    The learning rate that is found is the peak of the schedule. If the module (or its ``hparams``) has an attribute
    ``lr`` or ``learning_rate``, it is set and ``configure_optimizers`` is called again; whatever has not followed is
    scaled: parameter groups, their initial and maximal learning rates, and the schedules' base learning rates. Groups
    keep their ratios, in the sweep and after it. The number found belongs to the groups that have the attribute's
    value, or to the first group of the first optimizer.

    It runs at ``on_train_start``, since there a checkpoint has been loaded under every strategy, so that it can tell a
    resumed run and leave it alone. It writes ``lr_finder.png`` and ``lr_finder.json``. If the loss is not finite from
    the start, or never falls, it warns, and training goes on with the learning rate that was configured.

    Args:
        suggestion: fastai's rule that picks the learning rate, see :func:`lightning_distill.functional.lr_suggestion`.
        min_lr: first learning rate of the sweep.
        max_lr: last learning rate of the sweep.
        num_steps: optimizer steps of the sweep, at least 32.
        mode: whether the learning rate rises exponentially or linearly.
        monitor: a logged metric to record in place of the training loss, such as ``"val_loss"``; after every step of
            the sweep, ``val_batches`` validation batches are evaluated for it.
        val_batches: validation batches for ``monitor``.
        smoothing: weight of the past in the moving average of the loss.
        divergence: the sweep stops when the smoothed loss is this many times the best one; None never stops it.
        attribute: where the module keeps its learning rate, if it is neither ``lr`` nor ``learning_rate``.
        keep_callbacks: class names of callbacks that stay active in the sweep, since they change the step.
        recommended_range: learning rates commonly recommended for the task, lowest and highest, or what
            :func:`lightning_distill.optim.recommended_lr` returns; shaded in the picture, and a warning is given if the
            one found is more than 10 times outside.
        snapshot: where the state is kept meanwhile; ``"auto"`` takes host memory if the model fits there a second time,
            and otherwise a file in ``output_dir`` for as long as the sweep lasts.
        output_dir: folder for the picture and the numbers; by default the Trainer's ``default_root_dir``.

    Attributes:
        lr: the learning rate found, or None.

    Raises:
        ValueError: an argument is out of its range, the strategy is DeepSpeed, or a parameter group has no learning
            rate.

    Example:
        >>> finder = LRFinder("steepest", min_lr=1e-6, max_lr=1.0)
        >>> trainer = L.Trainer(callbacks=finder, accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> finder.state_dict()  # after trainer.fit(module) it holds the learning rate that was found
        {'lr': None}

    Source: Smith, Cyclical Learning Rates for Training Neural Networks (2017); fastai's ``Learner.lr_find``.
    """

    def __init__(
        self,
        suggestion: Suggestion = "valley",
        *,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        num_steps: int = 100,
        mode: Literal["exponential", "linear"] = "exponential",
        monitor: str | None = None,
        val_batches: int = 1,
        smoothing: float = 0.98,
        divergence: float | None = 4.0,
        attribute: str | None = None,
        keep_callbacks: Sequence[str] = ("GradientClipping",),
        recommended_range: tuple[float, float] | LRRange | None = None,
        snapshot: Literal["auto", "memory", "disk"] = "auto",
        output_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        one_of("suggestion", suggestion, get_args(Suggestion))
        one_of("mode", mode, ("exponential", "linear"))
        one_of("snapshot", snapshot, ("auto", "memory", "disk"))
        between("min_lr", min_lr, 0)
        between("max_lr", max_lr, 0)
        if max_lr <= min_lr:
            raise ValueError(f"Expected argument `max_lr` to be above `min_lr` ({min_lr}), but got {max_lr}.")
        between("num_steps", num_steps, 32, closed=True)
        between("val_batches", val_batches, 1, closed=True)
        between("smoothing", smoothing, 0, 1, closed=True)
        if smoothing == 1:
            raise ValueError(f"Expected argument `smoothing` to be below 1, but got {smoothing}.")
        if divergence is not None:
            between("divergence", divergence, 1)
        if recommended_range is not None and not 0 < recommended_range[0] <= recommended_range[1]:
            raise ValueError(
                "Expected argument `recommended_range` to be a pair of positive, rising learning rates, but got "
                f"{recommended_range!r}."
            )
        self.suggestion, self.min_lr, self.max_lr, self.num_steps = suggestion, min_lr, max_lr, num_steps
        self.mode, self.monitor, self.val_batches = mode, monitor, val_batches
        self.smoothing, self.divergence = smoothing, divergence
        self.attribute, self.keep_callbacks, self.snapshot = attribute, tuple(keep_callbacks), snapshot
        self.recommended_range = None if recommended_range is None else tuple(recommended_range[:2])
        self.output_dir = output_dir
        self.lr: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The learning rate that was found."""
        return {"lr": self.lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the learning rate that the checkpoint's run has found."""
        self.lr = state_dict["lr"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sweep, put everything back, and set the learning rate, unless this run is a resumed one."""
        if trainer.fast_dev_run or trainer.ckpt_path is not None or trainer.global_step > 0:  # type: ignore[attr-defined]
            rank_zero_info("LRFinder: no sweep in a dry run, nor in a run that goes on from a checkpoint or a fit")
            return
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "Expected argument `strategy` of the Trainer to leave weights and optimizers to callbacks, but got "
                "DeepSpeedStrategy; find the learning rate under another strategy, such as ModelParallelStrategy"
            )
        attribute = self._attribute(pl_module)
        held = None if attribute is None else float(lightning_getattr(pl_module, attribute))  # type: ignore[arg-type]
        peaks = peak_lrs(trainer.optimizers, _schedules(trainer))
        configured = peaks[0][0]
        if held is not None and any(math.isclose(lr, held) for group in peaks for lr in group):
            configured = held
        if configured <= 0:
            raise ValueError(
                f"Expected the first parameter group to have a positive learning rate, but got {configured}"
            )
        ratios = [[peak / configured for peak in group] for group in peaks]
        report = self._sweep(trainer, ratios) | {"configured_lr": configured, "problem": None}
        try:
            curve = trim_curve(report["lrs"], report["losses"], self.smoothing, max(1, self.num_steps // 10))
            report["suggestions"] = {rule: lr_suggestion(*curve, rule) for rule in get_args(Suggestion)}
        except ValueError as problem:
            report["problem"] = str(problem)
            rank_zero_warn(f"LRFinder keeps the configured learning rate {configured:g}. {problem}")
        else:
            self.lr = found = float(trainer.strategy.broadcast(report["suggestions"][self.suggestion]))
            if attribute is not None and held is not None:
                new = found if held == configured else held * found / configured
                lightning_setattr(pl_module, attribute, new)
                trainer.strategy.setup_optimizers(trainer)
                _optimizers_to_device(trainer.strategy.optimizers, trainer.strategy.root_device)
            _set_peaks(trainer, [[ratio * found for ratio in group] for group in ratios])
            rank_zero_info(f"LRFinder: learning rate {found:.3g} in place of {configured:.3g} ({self.suggestion})")
        self._save(trainer, report | {"lr": self.lr})

    def _attribute(self, pl_module: L.LightningModule) -> str | None:
        names = ("lr", "learning_rate") if self.attribute is None else (self.attribute,)
        for name in names:
            value = lightning_getattr(pl_module, name) if lightning_hasattr(pl_module, name) else None
            if isinstance(value, float | int) and value > 0:
                return name
        if self.attribute is not None:
            raise ValueError(
                f"Expected argument `attribute` to name a positive number of the module or its hparams, but got "
                f"{self.attribute!r}"
            )
        return None

    def _sweep(self, trainer: Any, ratios: list[list[float]]) -> dict[str, Any]:
        kept = [c for c in trainer.callbacks if {cls.__name__ for cls in type(c).__mro__} & set(self.keep_callbacks)]
        sweep, file = _Sweep(self, ratios), self._snapshot_file(trainer)
        val_batches = 0 if self.monitor is None else self.val_batches
        dry_run(trainer, sweep, kept, max_steps=self.num_steps, val_batches=val_batches, file=file)
        return {
            "lrs": sweep.plan[: len(sweep.losses)],
            "losses": sweep.losses,
            "smoothed": smooth_losses(sweep.losses, self.smoothing).tolist(),
            "diverged": sweep.diverged,
            "snapshot": "memory" if file is None else "disk",
        }

    def _snapshot_file(self, trainer: Any) -> Path | None:
        """Where to keep the state; None for host memory."""
        available, size = available_host_memory(), num_bytes(stateful_parts(trainer))
        # Each process on this machine has its own copy.
        fits = available is None or size * trainer.num_devices < 0.8 * available
        fits = trainer.strategy.reduce_boolean_decision(fits)
        in_memory = fits if self.snapshot == "auto" else self.snapshot == "memory"
        place = "host memory" if in_memory else "a file"
        rank_zero_info(f"LRFinder: sweep of {self.num_steps} steps, {size / 2**20:.0f} MiB of state kept in {place}")
        return None if in_memory else self._folder(trainer) / f".lr_finder_{trainer.global_rank}.pt"

    def _folder(self, trainer: L.Trainer) -> Path:
        folder = Path(self.output_dir if self.output_dir is not None else trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @rank_zero_only
    def _save(self, trainer: L.Trainer, report: dict[str, Any]) -> None:
        if self.recommended_range is not None and self.lr is not None:
            low, high = self.recommended_range
            LRRange(low, high, "look at lr_finder.png before a long training").warn_if_far(self.lr)
        settings = ("suggestion", "min_lr", "max_lr", "num_steps", "mode", "monitor", "smoothing", "recommended_range")
        report = {name: getattr(self, name) for name in settings} | report
        plot_sweep(report).savefig(self._folder(trainer) / "lr_finder.png", dpi=120)
        for name in ("losses", "smoothed"):  # JSON has no NaN
            report[name] = [loss if math.isfinite(loss) else None for loss in report[name]]
        (self._folder(trainer) / "lr_finder.json").write_text(json.dumps(report, indent=1))


def _schedules(trainer: L.Trainer) -> list[Any]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def _set_peaks(trainer: L.Trainer, wanted: list[list[float]]) -> None:
    def factor(wanted: float, lr: float) -> float:
        # A group that is held at zero stays there; one that has followed already is not moved by a rounding error.
        return 1.0 if lr == 0 or math.isclose(wanted, lr) else wanted / lr

    peaks = peak_lrs(trainer.optimizers, _schedules(trainer))
    factors = [[*map(factor, *group)] for group in zip(wanted, peaks, strict=True)]
    scale_peak_lrs(trainer.optimizers, _schedules(trainer), factors)


class _Sweep(L.Callback):
    """Sets the learning rate before each optimizer step and records the loss after it."""

    def __init__(self, finder: LRFinder, ratios: list[list[float]]) -> None:
        steps = torch.linspace(0, 1, finder.num_steps, dtype=torch.float64)
        low, high = finder.min_lr, finder.max_lr
        plan = low * (high / low) ** steps if finder.mode == "exponential" else low + (high - low) * steps
        self.plan: list[float] = plan.tolist()
        self.finder, self.ratios = finder, ratios
        self.losses: list[float] = []
        self.diverged = False
        self._micro_losses: list[Tensor] = []
        self._average, self._best = 0.0, math.inf

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        for optimizer, ratios in zip(trainer.optimizers, self.ratios, strict=True):
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                set_lr(group, ratio * self.plan[len(self.losses)])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        if self.finder.monitor is not None:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            # Automatic optimization has divided the loss by the number of accumulated batches.
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._micro_losses.append(loss.detach() * parts)
        if not trainer.fit_loop._should_accumulate():
            skipped = torch.full((), math.nan, device=pl_module.device)
            self._record(trainer, torch.stack(self._micro_losses).mean() if self._micro_losses else skipped)
            self._micro_losses = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        name = self.finder.monitor
        if name not in trainer.callback_metrics:
            raise ValueError(
                f"Expected argument `monitor` to name a logged metric, but got {name!r}; there are "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'none'}"
            )
        self._record(trainer, trainer.callback_metrics[name])

    def _record(self, trainer: L.Trainer, loss: Tensor) -> None:
        value = trainer.strategy.reduce(loss.double().to(trainer.strategy.root_device), reduce_op="mean").item()
        self.losses.append(value)
        smoothing, limit = self.finder.smoothing, self.finder.divergence
        self._average = smoothing * self._average + (1 - smoothing) * value
        smoothed = self._average / (1 - smoothing ** len(self.losses))
        self._best = min(self._best, smoothed)
        # For positive losses this is smoothed > limit * best; it also holds its meaning for negative ones.
        far = limit is not None and smoothed - self._best > (limit - 1) * abs(self._best)
        self.diverged = far or not math.isfinite(value)
        trainer.should_stop = self.diverged or len(self.losses) == len(self.plan)


def plot_sweep(report: dict[str, Any]) -> Figure:
    """Draw the curve of a sweep as ``lr_finder.json`` holds it; needs no display.

    Args:
        report: what ``lr_finder.json`` holds.

    Example:
        >>> lrs = [10 ** (k / 10 - 5) for k in range(40)]
        >>> losses = [2 - k / 40 for k in range(40)]
        >>> report = {"lrs": lrs, "losses": losses, "smoothed": losses, "mode": "exponential", "configured_lr": 1e-3}
        >>> [axes.get_xlabel() for axes in plot_sweep(report).axes]
        ['learning rate']
    """
    lrs, losses, curve = (torch.tensor(report[name]) for name in ("lrs", "losses", "smoothed"))
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(lrs, losses, color="0.75", linewidth=1, label=report.get("monitor") or "training loss")
    axes.plot(lrs, curve, color="C0", linewidth=2, label="smoothed")
    for (rule, lr), marker in zip(report.get("suggestions", {}).items(), "osD^", strict=False):
        taken = rule == report.get("suggestion")
        style: dict[str, Any] = {"markersize": 12, "color": "C3"} if taken else {"markersize": 8, "color": "0.25"}
        label = f"{rule} {lr:.2g}{' (taken)' if taken else ''}"
        axes.plot(
            [lr], [curve[(lrs - lr).abs().argmin()]], marker, markeredgecolor="white", label=label, zorder=3, **style
        )
    configured = report["configured_lr"]
    axes.axvline(configured, color="0.25", linestyle=":", label=f"configured {configured:.2g}")
    if report.get("recommended_range"):
        low, high = report["recommended_range"]
        axes.axvspan(low, high, color="C2", alpha=0.15, label=f"recommended {low:.2g} to {high:.2g}")
    if curve.isfinite().any():
        # Up to its lowest point, where the rules look: the explosion after it would flatten the valley.
        down = slice(0, int(curve.nan_to_num(math.inf).argmin()) + 1)
        low, high = losses[down].quantile(torch.tensor([0.02, 0.98])).tolist()
        low, high = min(low, curve[down].min().item()), max(high, curve[down].max().item())
        margin = 0.1 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
    if report["mode"] == "exponential":
        axes.set_xscale("log")
    title = "Learning-rate range test: no suggestion" if report.get("problem") else "Learning-rate range test"
    axes.set(xlabel="learning rate", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure
