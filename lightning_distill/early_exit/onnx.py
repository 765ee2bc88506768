"""A model with early exits as one ONNX graph per stage, and the driver that runs them."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.early_exit.inference import EarlyExitInference
from lightning_distill.early_exit.walk import caught_layers, first_tensor
from lightning_distill.models.batch import token_mask
from lightning_distill.models.calling import call_model, evaluating, logits_of
from lightning_distill.models.exporting import source_of
from lightning_distill.models.folders import check_folder, writing


class _Stage(nn.Module):
    """The layers between two exits, as a function of the model's inputs and the hidden state before them.

    The forward is the student's own. Layers of other stages pass on what they are given, so the embeddings and the head
    are dead code in the stages that do not need them, while masks and positions are computed where they are used.
    """

    def __init__(self, model: EarlyExitInference, names: list[str], start: int, stop: int) -> None:
        super().__init__()
        self.student, self.names, self.start, self.stop = model.student, names, start, stop
        self.model = [model]  # in a list: its student is registered once

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (model,) = self.model
        batch = dict(zip(self.names, tensors, strict=False))
        given = tensors[len(self.names)] if self.start else None
        here: Tensor | None = None

        def call(position: int, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal here
            before = first_tensor(args or tuple(kwargs.values()))
            if position < self.start or position >= self.stop:
                return before
            if position == self.start and given is not None:
                args = (given, *args[1:])
                if not args[1:] and "hidden_states" in kwargs:
                    args, kwargs = (), {**kwargs, "hidden_states": given}
            output = inner(*args, **kwargs)
            here = first_tensor(output)
            return output

        with caught_layers(self.student, model.layers, call):
            logits = logits_of(call_model(self.student, batch))
        if self.stop == model.depth:
            return (logits,)
        assert here is not None
        layer = self.stop - 1
        logits, gate = model.ramps.ask(layer, here, token_mask(batch))
        temperature = model.temperatures.get(layer, 1.0)
        measure, _ = model.criterion.measure(logits / temperature, gate, ())
        return logits, measure, here


def export_onnx(
    model: EarlyExitInference, folder: str | os.PathLike[str], batch: dict[str, Tensor] | None = None
) -> Path:
    """Write one ONNX graph per stage, ``onnx.json`` and ``early_exit_onnx.py``, which runs them in onnxruntime.

    A stage takes the inputs of the rows that are still under way and the hidden state that the stage before gave them.
    Batch size and length are free.

    Args:
        model: A transformers model that classifies sequences, by a criterion that remembers nothing.
        folder: Where to write; see :func:`lightning_distill.models.folders.writing`.
        batch: An example of the inputs, of at least two rows, some of them padded; None for ``input_ids`` and
            ``attention_mask``.

    Raises:
        ValueError: If the model or its criterion cannot be exported, or the folder holds anything else.
        ModuleNotFoundError: If the extra ``onnx`` is not installed.
    """
    if model.criterion.remembers or model.ramps.task != "classification" or not hasattr(model.student, "config"):
        raise ValueError(
            "Expected a transformers model that classifies sequences by a criterion that remembers nothing, such as "
            f"Confidence, but got {type(model.student).__name__} in {model.ramps.task} with {model.criterion!r}."
        )
    try:
        import onnxscript  # noqa: F401  # what torch.onnx.export needs, and says only deep inside
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "export_onnx needs onnx and onnxscript: pip install 'lightning-distill[onnx]'"
        ) from error
    check_folder(folder, sources=source_of(model.student))
    if batch is None:
        mask = torch.ones(2, 8, dtype=torch.long, device=next(model.parameters()).device)
        mask[0, 6:] = 0
        batch = {"input_ids": mask.clone(), "attention_mask": mask}
    batch = {name: value for name, value in batch.items() if name != "labels"}
    with writing(folder, sources=source_of(model.student)) as draft, evaluating(model.student):
        _write(model, draft, batch)
    return Path(folder)


def _write(model: EarlyExitInference, folder: Path, batch: dict[str, Tensor]) -> None:
    names = list(batch)
    rows, length = torch.export.Dim("rows", min=1), torch.export.Dim("length", min=2)
    stops = [*(layer + 1 for layer in sorted(model.thresholds)), model.depth]
    stages: list[dict[str, Any]] = []
    start = 0
    tensors: tuple[Tensor, ...] = tuple(batch.values())
    hidden: Tensor | None = None
    for index, stop in enumerate(stops):
        stage = _Stage(model, names, start, stop)
        given = tensors if hidden is None else (*tensors, hidden)
        outputs = ["logits"] if stop == model.depth else ["logits", "measure", "next_hidden_state"]
        file = f"stage{index}.onnx"
        with warnings.catch_warnings(), torch.no_grad():
            # The exporter warns of its own use of torch.
            warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning, UserWarning))
            torch.onnx.export(
                stage,
                given,
                folder / file,
                input_names=[*names, *(["hidden_state"] if start else [])],
                output_names=outputs,
                dynamic_shapes=(tuple({0: rows, 1: length} for _ in given),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            if stop < model.depth:
                hidden = stage(*given)[2]
        layer = stop - 1
        stages.append({"file": file, "layer": layer, "threshold": model.thresholds.get(layer)})
        start = stop
    config = {"inputs": names, "depth": model.depth, "rising": model.criterion.rising, "stages": stages}
    (folder / "onnx.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(Path(__file__).with_name("onnx_driver.py"), folder / "early_exit_onnx.py")
