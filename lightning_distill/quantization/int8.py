"""int8 and 4-bit linears of other libraries: torchao for latency, bitsandbytes for memory, onnxruntime to serve."""

import copy
import importlib
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from lightning_distill.arguments import one_of, typed
from lightning_distill.models.calling import logits_of
from lightning_distill.models.exporting import check_floats
from lightning_distill.models.files import on_meta
from lightning_distill.models.pretrained import architecture_of, load_whole, read_config
from lightning_distill.quantization.plan import EXCLUDE, matches
from lightning_distill.quantization.replaceable import copied, why_not_replaceable

#: torchao's floor for a scale; an output whose scale is raised to it loses up to all of itself.
_LEAST_SCALE = torch.finfo(torch.float32).eps


@typed
def quantize_int8(model: nn.Module, *, exclude: Sequence[str] = EXCLUDE) -> nn.Module:
    """Make a copy whose linear layers multiply in int8: weights per output, activations per token, as they come.

    Layers that int8 could not stand in for (of a class of their own, with hooks, or whose weight is computed or too
    small) stay in floating point, and a warning names them. Needs no calibration. torchao's kernels gain on many
    tokens at once, and on few once the model is compiled (``model.compile()``); its state dict holds tensors of
    torchao's own.

    Args:
        model: Any module with ``nn.Linear`` layers.
        exclude: Patterns of the layers to leave; see :func:`lightning_distill.quantization.quantize`.

    Returns:
        The copy, in eval mode.

    Raises:
        ModuleNotFoundError: If torchao is not installed.
        ValueError: If no linear layer is left.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.quantization import quantize_int8
        >>> quantized = quantize_int8(nn.Sequential(nn.Linear(64, 32)))  # doctest: +SKIP
    """
    torchao = _require("torchao.quantization", "int8")
    model = copied(model)
    found = {
        name: _why_not_int8(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not matches(name, exclude)
    }
    layers = {name for name, reason in found.items() if reason is None}
    if not layers:
        raise ValueError(
            f"Expected argument `exclude` to leave linear layers, but {list(exclude)} leaves none that int8 can stand "
            f"in for{_listed(found)}."
        )
    if len(layers) < len(found):
        warnings.warn(f"{len(found) - len(layers)} linear layers stay in floating point{_listed(found)}.", stacklevel=2)
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(), lambda module, name: name in layers)
    return model


def _why_not_int8(layer: nn.Module) -> str | None:
    reason = why_not_replaceable(layer)
    if reason is None and layer.in_features and layer.out_features:
        assert isinstance(layer.weight, Tensor)
        largest = layer.weight.detach().abs().amax(1)
        if bool(((largest > 0) & (largest < 127 * _LEAST_SCALE)).any()):
            return f"an output has no weight above {127 * _LEAST_SCALE:.1e}, the least that torchao can tell from 0"
    return reason


def _listed(reasons: Mapping[str, str | None]) -> str:
    named = [f"`{name}`, {reason}" for name, reason in reasons.items() if reason is not None]
    return f": {'; '.join(named[:3])}{' ...' if len(named) > 3 else ''}" if named else ""


def load_in_8bit(folder: str | os.PathLike[str], *, exclude: Sequence[str] = EXCLUDE) -> nn.Module:
    """Load a teacher or a student with the 8-bit linear layers of bitsandbytes (LLM.int8), on the CPU or the GPU.

    These multiply in float16 whatever comes in, and bitsandbytes says so once, at the first batch.

    Args:
        folder: Folder or hub id of a transformers model in floating point.
        exclude: Patterns of the layers to leave in floating point.

    Returns:
        The model, in eval mode.

    Raises:
        ModuleNotFoundError: If bitsandbytes is not installed.
        ValueError: If the folder holds no model with a head.

    Example:
        >>> from lightning_distill.quantization import load_in_8bit
        >>> teacher = load_in_8bit("path/to/teacher")  # doctest: +SKIP

    Source: Dettmers et al., "LLM.int8()", 2022.
    """
    return _load_bitsandbytes(folder, exclude, load_in_8bit=True)


def load_in_4bit(
    folder: str | os.PathLike[str], quant_type: Literal["nf4", "fp4"] = "nf4", *, exclude: Sequence[str] = EXCLUDE
) -> nn.Module:
    """Load a teacher or a student with the 4-bit linear layers of bitsandbytes, on the CPU or the GPU.

    Args:
        folder: Folder or hub id of a transformers model in floating point.
        quant_type: ``"nf4"``, whose 16 values suit normally distributed weights, or ``"fp4"``.
        exclude: Patterns of the layers to leave in floating point.

    Returns:
        The model, in eval mode.

    Raises:
        ModuleNotFoundError: If bitsandbytes is not installed.
        ValueError: If the folder holds no model with a head, or ``quant_type`` is something else.

    Example:
        >>> from lightning_distill.quantization import load_in_4bit
        >>> teacher = load_in_4bit("path/to/teacher", "nf4")  # doctest: +SKIP

    Source: Dettmers et al., "QLoRA", 2023.
    """
    one_of("quant_type", quant_type, ("nf4", "fp4"))
    return _load_bitsandbytes(folder, exclude, load_in_4bit=True, bnb_4bit_quant_type=quant_type)


def _load_bitsandbytes(folder: str | os.PathLike[str], exclude: Sequence[str], **settings: Any) -> nn.Module:
    _require("bitsandbytes", "bitsandbytes")
    architecture = architecture_of(os.fspath(folder), "folder")
    empty = on_meta(architecture, read_config(os.fspath(folder), "folder"), os.fspath(folder))
    left = [name for name, module in empty.named_modules() if isinstance(module, nn.Linear) and matches(name, exclude)]
    config = transformers.BitsAndBytesConfig(llm_int8_skip_modules=left or ["-"], **settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_whole(architecture, os.fspath(folder), "folder", device_map=device, quantization_config=config)
    return model.eval()


def export_onnx_int8(model: nn.Module, batch: Any, path: str | os.PathLike[str]) -> Path:
    """Write a model as ONNX whose linear layers multiply in int8, for onnxruntime.

    Weights are int8 per output, of 7 bits, as 8 overflow on processors without VNNI; activations are uint8 by their
    range at the time. The first dimension of every input, and the second of those with token ids, may vary.

    Args:
        model: A float model, transformers' or any other.
        batch: An example: a mapping of the inputs, a pair whose first item is the input, or the input itself.
        path: File to write, whole or not at all; one that was written here before is replaced.

    Returns:
        The path.

    Raises:
        ValueError: If there is anything else at the path, or the model is no float model.
        ModuleNotFoundError: If onnx or onnxruntime are not installed.

    Example:
        >>> from lightning_distill.quantization import export_onnx_int8
        >>> export_onnx_int8(student, batch, "student.onnx")  # doctest: +SKIP
    """
    _require("onnxscript", "onnx")
    quantization = _require("onnxruntime.quantization", "onnx")
    free = torch.export.Dim.DYNAMIC
    inputs = batch if isinstance(batch, Mapping) else {"input": batch[0] if isinstance(batch, (tuple, list)) else batch}
    inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}
    # Token ids, masks and the like are [rows, tokens].
    shapes = tuple({0: free} if value.is_floating_point() else {0: free, 1: free} for value in inputs.values())
    path = Path(path)
    _check_replaceable(path)
    check_floats(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    wrapped = _Logits(copy.deepcopy(model).cpu(), list(inputs) if isinstance(batch, Mapping) else None).eval()
    arguments = tuple(value.cpu() for value in inputs.values())
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        torch.onnx.export(
            wrapped, arguments, plain, dynamo=True, verbose=False, input_names=list(inputs), output_names=["logits"],
            dynamic_shapes=(shapes,), external_data=False,
        )  # fmt: skip
        # Beside it, for a rename within a disk; what a kill leaves of it, the next one writes over.
        draft = path.with_name(f".{path.name}.tmp")
        try:
            # Where a processor has no VNNI, products of uint8 and int8 are added in pairs in 16 bits and overflow:
            # with weights of 7 bits the sum fits, on every processor. Answers are then 1.5 % off in the place of 14.
            signed = quantization.QuantType.QInt8
            quantization.quantize_dynamic(plain, draft, weight_type=signed, per_channel=True, reduce_range=True)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return path


def _check_replaceable(path: Path) -> None:
    """Refuse to write over what onnxruntime's quantiser did not write, such as the float model."""
    if not os.path.lexists(path):
        return
    producer = None
    if path.is_file() and not path.is_symlink():
        onnx, protobuf = _require("onnx", "onnx"), _require("google.protobuf.message", "onnx")
        with suppress(OSError, protobuf.DecodeError):
            producer = onnx.load(path, format="protobuf", load_external_data=False).producer_name
    if producer != "onnx.quantize":
        found = f"an ONNX model of {producer!r}" if producer else "something else"
        raise ValueError(
            f"Expected argument `path` to be a new file, or one that `export_onnx_int8` wrote, but got {path}, "
            f"which is {found}. Name another file."
        )


class _Logits(nn.Module):
    """A model whose inputs come in order and whose answer is the logits alone."""

    def __init__(self, model: nn.Module, names: list[str] | None) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.names is None:
            return logits_of(self.model(*inputs))
        return logits_of(self.model(**dict(zip(self.names, inputs, strict=True))))


def _require(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Expected `{module.partition('.')[0]}` to be installed, but it is not; "
            f"`pip install 'lightning-distill[{extra}]'`."
        ) from error
