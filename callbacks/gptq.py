"""Quantise the student when training ends, and measure what it cost."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_distill.pretrained import export
from lightning_distill.quantization.checkpoint import save
from lightning_distill.quantization.model import EXCLUDE, LayerReport, quantize


class GPTQ(L.Callback):
    """Turns the student into a 4-, 3-, 2- or 8-bit model on fit end.

    The float student is saved first, to ``<folder>/float``; finished layers are kept until the end, so that a second
    fit end after a kill goes on where it stopped. The quantised student goes to ``<folder>/gptq``, the report to
    ``<folder>/gptq.json`` and ``gptq.png``. Validation then runs with the quantised student; where ``monitor`` falls by
    more than ``max_drop``, the module keeps the float student and the layers with the largest error are named.

    All of it happens on rank 0; the other ranks wait and keep the float student.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale: -1, 32, 64 or 128.
        calibration: ``"train"``, ``"val"``, or batches.
        num_samples: Rows of calibration data.
        embedding_bits: 8, 4, or None for float embeddings.
        exclude: Patterns of the layers to leave; see :func:`lightning_distill.quantization.quantize`.
        monitor: The validation metric to compare, higher is better; None does not validate.
        max_drop: How much of it may be lost; None for any.
        folder: Where to write; default ``<default_root_dir>/gptq``.

    Raises:
        ValueError: If an option is outside its set, or ``monitor`` was not logged.
        TypeError: If the module has no ``student``.

    Example:
        >>> from lightning_distill.callbacks import GPTQ
        >>> GPTQ(bits=4, group_size=64).bits
        4

    Source: Frantar et al., "GPTQ", 2022.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        calibration: Literal["train", "val"] | Iterable[Any] = "train",
        num_samples: int = 256,
        embedding_bits: int | None = None,
        exclude: Sequence[str] = EXCLUDE,
        monitor: str | None = None,
        max_drop: float | None = None,
        folder: str | None = None,
    ) -> None:
        if bits not in (2, 3, 4, 8):
            raise ValueError(f"Expected argument `bits` to be one of (2, 3, 4, 8), but got {bits}.")
        if group_size not in (-1, 32, 64, 128):
            raise ValueError(f"Expected argument `group_size` to be one of (-1, 32, 64, 128), but got {group_size}.")
        if isinstance(calibration, str) and calibration not in ("train", "val"):
            raise ValueError(f"Expected argument `calibration` to be 'train', 'val' or data, but got {calibration!r}.")
        if num_samples < 1:
            raise ValueError(f"Expected argument `num_samples` to be at least 1, but got {num_samples}.")
        if max_drop is not None and monitor is None:
            raise ValueError("Expected argument `monitor` to name a metric, as `max_drop` is given, but got None.")
        self.bits, self.group_size, self.calibration, self.num_samples = bits, group_size, calibration, num_samples
        self.embedding_bits, self.exclude, self.monitor, self.max_drop = embedding_bits, exclude, monitor, max_drop
        self.folder = folder
        self.report: list[LayerReport] = []
        self.summary: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module without a student before it is trained."""
        if not isinstance(getattr(pl_module, "student", None), nn.Module):
            raise TypeError(
                "Expected the LightningModule to hold the model to quantise as its attribute `student`, but it has "
                "none; call `lightning_distill.quantization.quantize(model, dataloader)` after fit."
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Quantise, save, validate, and keep the quantised student unless it lost too much."""
        if trainer.is_global_zero:
            self._run(trainer, pl_module)
        trainer.strategy.barrier("gptq")

    def _run(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(self.folder or Path(trainer.default_root_dir) / "gptq")
        student, tokenizer = pl_module.student, getattr(pl_module, "tokenizer", None)
        assert isinstance(student, nn.Module)
        export(student, folder / "float", tokenizer)
        before = self._validate(trainer, pl_module)
        loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders}
        data: Any = loaders[self.calibration] if isinstance(self.calibration, str) else self.calibration
        started = time.perf_counter()
        quantized, self.report = quantize(
            student,
            data,
            bits=self.bits,
            group_size=self.group_size,
            embedding_bits=self.embedding_bits,
            exclude=self.exclude,
            num_samples=self.num_samples,
            resume=folder / "layers",
        )
        seconds = time.perf_counter() - started
        save(quantized, folder / "gptq", tokenizer)
        size = sum(path.stat().st_size for path in (folder / "gptq").glob("*.safetensors"))
        pl_module.student = quantized
        after = self._validate(trainer, pl_module)
        worst = sorted(self.report, key=lambda layer: -layer.error)[:3]
        kept = self.max_drop is None or before is None or after is None or before - after <= self.max_drop
        if not kept:
            pl_module.student = student
        self.summary = {
            "bits": self.bits,
            "group_size": self.group_size,
            "bytes": size,
            "metric": after,
            "metric_before": before,
            "seconds": seconds,
            "kept": kept,
        }
        described = {**self.summary, "layers": [asdict(layer) for layer in self.report]}
        (folder / "gptq.json").write_text(json.dumps(described, indent=2) + "\n")
        _plot(self.report, folder / "gptq.png")
        for path in (folder / "layers").glob("*.safetensors"):
            path.unlink()
        rows = "\n".join(
            f"{layer.name:<50} {layer.shape!s:<14} {layer.bits} bit  error {layer.error:8.3%}  rounding "
            f"{layer.rounding_error:8.3%}  {layer.seconds:5.2f} s  {layer.note}"
            for layer in self.report
        )
        rank_zero_info(f"{rows}\nGPTQ: {size:,} bytes in {seconds:.1f} s, {self.monitor} {before} -> {after}")
        if not kept:
            names = ", ".join(f"{layer.name} ({layer.error:.1%})" for layer in worst)
            rank_zero_info(f"GPTQ: lost more than max_drop={self.max_drop}; the float student stays. Worst: {names}")

    def _validate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float | None:
        if self.monitor is None:
            return None
        # The loop of fit, without the callbacks: a checkpoint must not take this for an epoch.
        callbacks, trainer.callbacks = trainer.callbacks, []  # type: ignore[attr-defined]
        try:
            trainer.validating = True
            pl_module.eval()
            with torch.no_grad():
                trainer.fit_loop.epoch_loop.val_loop.run()
        finally:
            trainer.training = True
            trainer.callbacks = callbacks  # type: ignore[attr-defined]
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"Expected argument `monitor` to be a logged metric, but got {self.monitor!r}; logged are "
                f"{sorted(trainer.callback_metrics)}."
            )
        return float(trainer.callback_metrics[self.monitor])


def _plot(report: list[LayerReport], path: Path) -> None:
    from matplotlib.figure import Figure  # only here: importing it costs every process that quantises nothing

    rows = [layer for layer in report if layer.bits]
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.plot([100 * layer.rounding_error for layer in rows], places, "o", color="#b0b0b0", label="rounding")
    axes.plot([100 * layer.error for layer in rows], places, "o", color="#1f5fa8", label="GPTQ")
    axes.set_yticks(places, [layer.name for layer in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("relative squared error of the layer's output (%)")
    axes.legend()
    figure.savefig(path, dpi=120)
