"""EarlyExitModel: a student whose rows leave at the layer that is sure."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_distill.early_exit.calibration import calibrate
from lightning_distill.early_exit.criteria import criterion_from
from lightning_distill.early_exit.inference import EarlyExitInference, Prediction
from lightning_distill.early_exit.onnx import export_onnx
from lightning_distill.early_exit.ramps import CONFIG, Ramps
from lightning_distill.early_exit.report import Calibration
from lightning_distill.models.class_names import check_data_classes
from lightning_distill.models.exporting import source_of, write_model
from lightning_distill.models.files import BROKEN, one_line, read_json
from lightning_distill.models.folders import writing
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.quantization.checkpoint import load as load_quantized
from lightning_distill.tasks import TASKS


class EarlyExitModel(EarlyExitInference):
    """A student with ramps, whose rows leave at the first exit that is sure of them.

    Each row's answer and exit are those it has alone (to float tolerance), whatever batch it comes in: rows that are
    sure are taken out of the batch and the others go on; see :mod:`lightning_distill.early_exit.walk`. Where taking few
    rows out costs more than carrying them to the next exit, by times measured on the way, they are carried.

    A ramp whose logits are not finite is never sure; such rows go on and are counted in ``nonfinite_rows``.

    Works with ``Trainer.predict`` and ``Trainer.test``. The ramps are part of the student (``student.ramps``).

    Args:
        student: A transformers model with a head for sequences or tokens, or any module with a stack of layers.
        ramps: Its ramps, from :func:`make_ramps` or trained by the ``EarlyExit`` callback; None for those it holds.
        thresholds: One for all exits, or one by layer; an exit without one is not used. None takes the criterion's;
            where that has none either, nothing leaves. Can be set at any time: ``model.thresholds = {2: 0.9}``.
        criterion: When an exit is sure; None for what the ramps were made with.
        temperatures: What a ramp's logits are divided by, by layer; 1 for those not named.
        sort: Whether to put the rows in order of the first exit's measure, so that those that leave later are at the
            end of the batch and taking them out copies nothing. The order of the answers is the batch's all the same.

    Raises:
        ValueError: If the student has no ramps or those of other classes, a threshold is out of range, or an exit has
            no ramp.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from lightning_distill.early_exit import Confidence, EarlyExitModel, make_ramps
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
        >>> student = BertForSequenceClassification(config)
        >>> model = EarlyExitModel(student, make_ramps(student), criterion=Confidence(0.0))
        >>> logits, exit_layer = model.predict({"input_ids": torch.ones(5, 4, dtype=torch.long)})
        >>> logits.shape, exit_layer.tolist()
        (torch.Size([5, 2]), [0, 0, 0, 0, 0])
    """

    def setup(self, stage: str) -> None:
        """Refuse data whose classes are numbered in another order than the student's."""
        check_data_classes(self.student, getattr(self.trainer, "datamodule", None))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        """As :meth:`predict`."""
        return self.predict(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the metric of the task as ``test_<metric>`` and the mean number of layers as ``test_mean_depth``."""
        logits, exit_layer = self.predict(batch)
        task = self.ramps.task
        logits, labels, mask = TASKS[task].align(logits, batch)
        self.log("test_mean_depth", (exit_layer + 1).float().mean(), batch_size=len(exit_layer), sync_dist=True)
        if labels is not None:
            (name, metric), attribute = TASKS[task].metric(), f"metric_{dataloader_idx}"
            if not hasattr(self, attribute):
                setattr(self, attribute, metric.to(self.device))
            metric = getattr(self, attribute)
            metric.update(*TASKS[task].scored(logits, labels, mask))
            self.log(f"test_{name}", metric, metric_attribute=attribute)

    def calibrate(self, dataloader: Iterable[Any], **options: Any) -> Calibration:
        """Choose the thresholds; see :func:`lightning_distill.early_exit.calibrate`."""
        return calibrate(self, dataloader, **options)

    def export_onnx(self, folder: str | os.PathLike[str], batch: dict[str, Tensor] | None = None) -> Path:
        """Write one ONNX graph per stage and a driver; see :func:`lightning_distill.early_exit.onnx.export_onnx`."""
        return export_onnx(self, folder, batch)

    def save_pretrained(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
        """Write the student (which others load as ever), ``ramps.safetensors`` and ``early_exit.json``.

        Args:
            folder: Where to write; see :func:`lightning_distill.models.folders.writing`.
            tokenizer: Saved beside them.

        Raises:
            ValueError: If the folder holds anything else, or is the one that the student was loaded from.
        """
        with writing(folder, sources=source_of(self.student)) as draft:
            write_model(self.student, draft, tokenizer)
            self.ramps.save(draft, **self.settings())
        return Path(folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], student: nn.Module | None = None) -> "EarlyExitModel":
        """Load what :meth:`save_pretrained`, the callback or ``DistillationModule.export`` wrote, in eval mode.

        Args:
            folder: The folder.
            student: The student with its weights, for one that is no transformers model.

        Raises:
            ValueError: If the folder holds no ramps, or they or the student are not whole.
        """
        folder = Path(folder)
        ramps, config = Ramps.load(folder)
        if student is None:
            quantized = "quantization_config" in read_json(folder / "config.json")
            student = load_quantized(folder) if quantized else load_pretrained(folder, "folder")
        try:
            return cls(
                student,
                ramps,
                {int(layer): value for layer, value in config.get("thresholds", {}).items()},
                criterion_from(config["criterion"]) if "criterion" in config else None,
                temperatures={int(layer): value for layer, value in config.get("temperatures", {}).items()},
            )
        except BROKEN as error:
            if isinstance(error, ValueError) and str(error).startswith("Expected"):
                raise
            raise ValueError(f"Expected {folder / CONFIG} to fit its student, but got: {one_line(error)}") from error
