"""Quantise the student when training ends, and measure what it cost."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torchmetrics import Metric
from tqdm.auto import tqdm

from lightning_distill.arguments import finite, one_of, typed
from lightning_distill.models.exporting import export, source_of
from lightning_distill.models.folders import check_folder, writing
from lightning_distill.quantization.checkpoint import save
from lightning_distill.quantization.finished import remove_layers
from lightning_distill.quantization.linear import QuantLinear
from lightning_distill.quantization.mixed import most_sensitive, sensitivity
from lightning_distill.quantization.model import quantize
from lightning_distill.quantization.plan import EXCLUDE, LayerReport, check_options
from lightning_distill.quantization.report import plot, table

#: Arguments that are handed on to `quantize`.
_OPTIONS = (
    *("bits", "group_size", "num_samples", "embedding_bits", "sym", "desc_act", "static_groups", "mse"),
    *("damp_percent", "true_sequential", "asymmetric", "include", "exclude", "bits_by_pattern"),
    "group_size_by_pattern",
)


@typed
class GPTQ(L.Callback):
    """Turns the student into a 4-, 3-, 2- or 8-bit model on fit end, or after ``trainer.validate``; once.

    The float student is saved first, to ``<folder>/student``. Finished layers are kept until the end, so that after a
    kill a fit from the last checkpoint, which has nothing left to train, goes on where quantising stopped. The
    quantised student goes to ``<folder>/student-gptq``, and with it the report, ``gptq.json`` and ``gptq.png``.

    ``monitor`` is measured with the float student and again with the quantised one; loggers get
    ``gptq_<monitor>`` and ``gptq_drop``. Where more than ``max_drop`` is lost, the layers that hurt most are named.
    With ``sensitive_layers`` or ``budget_bytes``, these get ``sensitive_bits`` and all is measured again; if that loses
    too much as well, the module keeps the float student.

    Rank 0 quantises, the other ranks wait and are sent the result; all validate. A launcher that forks or spawns
    (``ddp_fork``, ``ddp_spawn``, ``ddp_notebook``) brings back weights alone: there the module keeps the float student,
    and the quantised one is in its folder. Sharded strategies are refused.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale: -1, 32, 64 or 128.
        calibration: ``"train"``, ``"val"``, or batches.
        num_samples: Rows of calibration data.
        sym: See :func:`lightning_distill.quantization.gptq_layer`, also for ``desc_act``, ``static_groups``, ``mse``
            and ``damp_percent``.
        desc_act: Inputs in order of activation.
        static_groups: Grids fixed beforehand.
        mse: Search smaller ranges.
        damp_percent: Damping.
        true_sequential: See :func:`lightning_distill.quantization.quantize`, also for ``asymmetric``.
        asymmetric: Ask each layer for the float model's outputs; not beside ``sensitive_layers`` or ``budget_bytes``.
        embedding_bits: 8, 4, or None for float embeddings.
        include: Patterns of the layers to quantise.
        exclude: Patterns of the layers to leave.
        bits_by_pattern: Other bits for some layers; 0 leaves them in floating point.
        group_size_by_pattern: Other group sizes for some layers.
        monitor: The validation metric to compare; None does not validate.
        mode: ``"max"`` if a higher ``monitor`` is better, ``"min"`` if a lower one is.
        max_drop: How much worse it may be; None for any.
        sensitive_layers: How many layers may have more bits when too much is lost.
        sensitive_bits: Their bits, 8, or 0 for floating point.
        budget_bytes: Bytes the safetensors file may have then; None for any.
        attribute: Name of the submodule to quantise, and of what is written.
        folder: Where to write; default ``default_root_dir``.

    Raises:
        ValueError: If an option is outside its set, ``monitor`` was not logged, the strategy shards the model, or a
            folder to write holds what was not written here.
        TypeError: If the module has no such submodule.

    Example:
        >>> from lightning_distill.callbacks import GPTQ
        >>> GPTQ(bits=4, group_size=64).group_size
        64

    Source: Frantar et al., "GPTQ", 2022.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        calibration: Literal["train", "val"] | Iterable[Any] = "train",
        num_samples: int = 256,
        *,
        sym: bool = True,
        desc_act: bool = True,
        static_groups: bool = True,
        mse: bool = False,
        damp_percent: float = 0.01,
        true_sequential: bool = True,
        asymmetric: bool | None = None,
        embedding_bits: int | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = EXCLUDE,
        bits_by_pattern: Mapping[str, int] | None = None,
        group_size_by_pattern: Mapping[str, int] | None = None,
        monitor: str | None = "val_accuracy",
        mode: Literal["max", "min"] = "max",
        max_drop: float | None = 0.01,
        sensitive_layers: int | None = None,
        sensitive_bits: Literal[8, 0] = 8,
        budget_bytes: int | None = None,
        attribute: str = "student",
        folder: str | None = None,
    ) -> None:
        check_options(
            bits, group_size, embedding_bits, bits_by_pattern, group_size_by_pattern, num_samples, damp_percent,
            true_sequential, asymmetric,
        )  # fmt: skip
        if isinstance(calibration, str):
            one_of("calibration", calibration, ("train", "val"))
        one_of("mode", mode, ("max", "min"))
        if max_drop is not None:
            finite("max_drop", max_drop)
        if sensitive_bits not in (8, 0):
            raise ValueError(f"Expected argument `sensitive_bits` to be 8 or 0, but got {sensitive_bits}.")
        for name, value in (("sensitive_layers", sensitive_layers), ("budget_bytes", budget_bytes)):
            if value is not None and value < 1:
                raise ValueError(f"Expected argument `{name}` to be at least 1 or None, but got {value}.")
            if value is not None and (monitor is None or max_drop is None):
                raise ValueError(f"Expected argument `{name}` to come with `monitor` and `max_drop`, but one is None.")
        if sensitive_layers is not None or budget_bytes is not None:
            # Which layer hurts is measured with it alone quantised, and asymmetric ones answer for those before them.
            if asymmetric:
                raise ValueError(
                    "Expected argument `asymmetric` to be off beside `sensitive_layers` and `budget_bytes`, which "
                    "measure each layer alone, but got True."
                )
            asymmetric = False
        self.calibration, self.monitor, self.mode, self.max_drop = calibration, monitor, mode, max_drop
        self.sensitive_layers, self.sensitive_bits, self.budget_bytes = sensitive_layers, sensitive_bits, budget_bytes
        self.attribute, self.folder = attribute, folder
        self.bits, self.group_size, self.embedding_bits, self.num_samples = (
            bits,
            group_size,
            embedding_bits,
            num_samples,
        )
        self.sym, self.desc_act, self.static_groups, self.mse = sym, desc_act, static_groups, mse
        self.damp_percent, self.true_sequential, self.asymmetric = damp_percent, true_sequential, asymmetric
        self.include, self.exclude = include, exclude
        self.bits_by_pattern, self.group_size_by_pattern = bits_by_pattern, group_size_by_pattern
        self.report: list[LayerReport] = []
        self.summary: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module or a strategy that cannot be quantised before it is trained."""
        if not isinstance(getattr(pl_module, self.attribute, None), nn.Module):
            raise TypeError(
                f"Expected the LightningModule to hold the model to quantise as its attribute `{self.attribute}`, but "
                "it has none; name another by `attribute`, or call "
                "`lightning_distill.quantization.quantize(model, dataloader)` after fit."
            )
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"Expected the whole model on each rank, but {type(trainer.strategy).__name__} shards it; export the "
                "student and call `lightning_distill.quantization.quantize(model, dataloader)` on it."
            )
        if trainer.is_global_zero:
            for written in self._folders(trainer):
                check_folder(written, sources=source_of(getattr(pl_module, self.attribute)))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a fit that never measures ``monitor``."""
        if self.monitor is not None and not trainer.enable_validation:
            raise ValueError(
                f"Expected argument `monitor` to be a logged metric, but got {self.monitor!r} and a fit without "
                "validation; pass `monitor=None`."
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say after the first validation, not after the last, that ``monitor`` is not logged."""
        if self.monitor is not None:
            self._monitored(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Quantise, save, validate, and keep the quantised student unless it lost too much."""
        self._run(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """After ``trainer.validate``, as on fit end."""
        if stage == "validate":
            self._run(trainer, pl_module)

    def _run(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        student: nn.Module = getattr(pl_module, self.attribute)
        if any(isinstance(module, QuantLinear) for module in student.modules()):
            return
        floats, folder = self._folders(trainer)
        tokenizer = getattr(pl_module, "tokenizer", None)
        self._put(pl_module, student)
        if trainer.is_global_zero:
            export(student, floats, tokenizer)
        if trainer.progress_bar_callback is not None:
            # A live display draws from a thread of its own, and would draw over the bar of the layers.
            trainer.progress_bar_callback.teardown(trainer, pl_module, "fit")
        # The strategy has put everything back on the CPU by now.
        pl_module.to(trainer.strategy.root_device)
        started = time.perf_counter()
        before = self._validate(trainer, pl_module)
        measured = time.perf_counter() - started
        quantized, after = self._attempt(trainer, pl_module, student, folder, {})
        kept, sensitive = self._is_good(before, after), []
        if not kept and (self.sensitive_layers is not None or self.budget_bytes is not None):
            sensitive = self._sensitive(trainer, pl_module, student, quantized, folder)
            if sensitive:
                bits = dict.fromkeys(sensitive, self.sensitive_bits) | dict(self.bits_by_pattern or {})
                quantized, after = self._attempt(trainer, pl_module, student, folder, {"bits_by_pattern": bits})
                kept = self._is_good(before, after)
        # A process that was forked hands its weights to one whose student is in floating point.
        stays = kept and not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        self._put(pl_module, quantized if stays else student)
        pl_module.cpu()
        self.summary = {
            "bits": self.bits,
            "group_size": self.group_size,
            "bytes": _bytes(folder) if trainer.is_global_zero else None,
            "metric": after,
            "metric_before": before,
            "seconds": time.perf_counter() - started - measured,
            "kept": kept,
            "sensitive": sensitive,
        }
        if trainer.is_global_zero:
            self._write(trainer, folder, before, after)
        trainer.strategy.barrier("gptq")

    def _folders(self, trainer: L.Trainer) -> tuple[Path, Path]:
        """Where the float and the quantised student go."""
        parent = Path(self.folder or trainer.default_root_dir)
        return parent / self.attribute, parent / f"{self.attribute}-gptq"

    def _attempt(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        student: nn.Module,
        folder: Path,
        changes: dict[str, Any],
    ) -> tuple[nn.Module, float | None]:
        """Quantise on rank 0, send the model to the others, validate on all."""
        self._put(pl_module, student)
        outcome: Any = None
        quantized: nn.Module | None = None
        if trainer.is_global_zero:
            try:
                quantized = self._quantize(trainer, pl_module, student, _layers(folder), changes)
                save(quantized, folder, getattr(pl_module, "tokenizer", None))
            except Exception as error:  # the other ranks wait for an answer
                outcome = error
        if trainer.world_size > 1:
            if quantized is not None:
                outcome = quantized.cpu()
            outcome = trainer.strategy.broadcast(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        quantized = quantized if quantized is not None else outcome
        assert quantized is not None
        self._put(pl_module, quantized.to(trainer.strategy.root_device))
        return quantized, self._validate(trainer, pl_module)

    def _put(self, pl_module: L.LightningModule, student: nn.Module) -> None:
        # DistillationModule's hooks that record signals would be copied, or stay behind on a model that nobody calls.
        release_hooks = getattr(pl_module, "release_hooks", None)
        if callable(release_hooks):
            release_hooks()
        setattr(pl_module, self.attribute, student)

    def _quantize(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        student: nn.Module,
        layers: Path,
        changes: dict[str, Any],
    ) -> nn.Module:
        bar = tqdm(desc="GPTQ", unit="layer", disable=trainer.progress_bar_callback is None)

        def advance(report: LayerReport, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(report.name, refresh=False)
            bar.update()

        with bar:
            options = {name: getattr(self, name) for name in _OPTIONS} | changes
            quantized, self.report = quantize(
                student, self._data(trainer, pl_module), resume=layers, on_layer=advance, **options
            )
        return quantized

    def _data(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        if not isinstance(self.calibration, str):
            return self.calibration
        loader = trainer.train_dataloader if self.calibration == "train" else trainer.val_dataloaders
        if loader is None:
            source = trainer.datamodule or pl_module  # type: ignore[attr-defined]
            loader = source.train_dataloader() if self.calibration == "train" else source.val_dataloader()
        return loader[0] if isinstance(loader, (list, tuple)) else loader

    def _sensitive(
        self, trainer: L.Trainer, pl_module: L.LightningModule, student: nn.Module, quantized: nn.Module, folder: Path
    ) -> list[str]:
        names: list[str] = []
        if trainer.is_global_zero:
            room = None if self.budget_bytes is None else self.budget_bytes - _bytes(folder)
            changes = sensitivity(student, quantized, self._data(trainer, pl_module))
            names = most_sensitive(
                self.report, changes, bits=self.sensitive_bits, count=self.sensitive_layers, budget_bytes=room
            )
            rank_zero_info(f"GPTQ: {len(names)} layers that change the answer most get more bits: {', '.join(names)}")
        result: list[str] = trainer.strategy.broadcast(names)
        return result

    def _is_good(self, before: float | None, after: float | None) -> bool:
        drop = _drop(before, after, self.mode)
        return drop is None or self.max_drop is None or drop <= self.max_drop

    def _validate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float | None:
        if self.monitor is None:
            return None
        # The loop alone: a checkpoint must not take this for an epoch, nor a logger for a point of training's curve.
        callbacks, loggers, stage = trainer.callbacks, trainer.loggers, trainer.state.stage  # type: ignore[attr-defined]
        loop = trainer.fit_loop.epoch_loop.val_loop
        verbose, loop.verbose = loop.verbose, False
        # What `Trainer.validate` counted in inference mode cannot be added to outside of it.
        for metric in (module for module in pl_module.modules() if isinstance(module, Metric)):
            metric.reset()
        trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
        try:
            trainer.state.stage = RunningStage.VALIDATING
            loop.run()
        finally:
            trainer.state.stage, loop.verbose = stage, verbose
            trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        value = torch.tensor(self._monitored(trainer), device=trainer.strategy.root_device)
        return float(trainer.strategy.reduce(value, reduce_op="mean"))

    def _monitored(self, trainer: L.Trainer) -> float:
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"Expected argument `monitor` to be a logged metric, but got {self.monitor!r}; logged are "
                f"{sorted(trainer.callback_metrics)}."
            )
        return float(trainer.callback_metrics[self.monitor])

    def _write(self, trainer: L.Trainer, folder: Path, before: float | None, after: float | None) -> None:
        described = {**self.summary, "layers": [asdict(layer) for layer in self.report]}
        with writing(folder, keep=True) as draft:
            (draft / "gptq.json").write_text(json.dumps(described, indent=2) + "\n")
            plot(self.report, draft / "gptq.png")
        remove_layers(_layers(folder))
        drop = _drop(before, after, self.mode)
        if after is not None and drop is not None:
            for logger in trainer.loggers:
                logger.log_metrics({f"gptq_{self.monitor}": after, "gptq_drop": drop}, step=trainer.global_step)
                logger.save()
        size, seconds = self.summary["bytes"], self.summary["seconds"]
        rank_zero_info(
            f"{table(self.report)}\nGPTQ: {size:,} bytes in {seconds:.1f} s, {self.monitor} {before} -> {after}"
        )
        if not self.summary["kept"]:
            worst = sorted(self.report, key=lambda layer: -layer.error)[:3]
            names = ", ".join(f"{layer.name} ({layer.error:.1%})" for layer in worst)
            rank_zero_info(f"GPTQ: lost more than max_drop={self.max_drop}; the float student stays. Worst: {names}")


def _drop(before: float | None, after: float | None, mode: str) -> float | None:
    if before is None or after is None:
        return None
    return before - after if mode == "max" else after - before


def _layers(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-layers")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
