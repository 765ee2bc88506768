"""The precision a teacher answers in, whatever the Trainer's is."""

import copy
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import safetensors.torch
import torch
import transformers
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_distill.arguments import one_of
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.quantization.int8 import load_in_4bit, load_in_8bit

TeacherPrecision = Literal["32", "bf16", "16", "int8", "nf4", "fp4"]
_DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


_CPU_BLOCK = 32  # outputs that bitsandbytes' 4-bit kernel computes together


def load_teacher(teacher: nn.Module | str, precision: TeacherPrecision | None) -> nn.Module:
    """Load a teacher in a precision of its own.

    Args:
        teacher: A module, a transformers folder, or a hub id.
        precision: ``"32"``, ``"bf16"`` or ``"16"`` (a module is cast in place); ``"int8"``, ``"nf4"`` or ``"fp4"``: the
            linear layers but the classifier by bitsandbytes, the rest in float32 (a module is copied, unless it is
            quantised already). None: as it is.

    Returns:
        The model.

    Raises:
        ValueError: If there is no such precision, or bitsandbytes is to quantise what is no transformers model.
        ModuleNotFoundError: If bitsandbytes is asked for and not installed.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.teachers.precision import load_teacher
        >>> load_teacher(nn.Linear(2, 2), "bf16").weight.dtype
        torch.bfloat16
    """
    if precision is not None:
        one_of("teacher_precision", precision, get_args(TeacherPrecision))
    if precision is None or precision in _DTYPES:
        model = load_pretrained(teacher, "teacher")
        return model if precision is None else model.to(_DTYPES[precision])
    if isinstance(teacher, str):
        return _quantized(teacher, precision)
    if is_quantized(teacher):
        return teacher
    if not isinstance(teacher, transformers.PreTrainedModel):
        raise ValueError(
            f"Expected argument `teacher` to be a transformers model, its folder or hub id for `teacher_precision="
            f"{precision!r}`, because bitsandbytes quantises while transformers loads, but got "
            f"{type(teacher).__name__}; use '32', 'bf16' or '16'."
        )
    with tempfile.TemporaryDirectory() as folder:
        # Not by `save_pretrained`, which writes on the first process alone once there are several.
        config = copy.deepcopy(teacher.config)
        config.architectures = [type(teacher).__name__]
        config.save_pretrained(folder)
        safetensors.torch.save_model(teacher, f"{folder}/model.safetensors", metadata={"format": "pt"})
        quantized: Any = _quantized(folder, precision)
        quantized.config._name_or_path = teacher.config._name_or_path  # not that of a folder that is gone
        return quantized


def is_quantized(model: nn.Module) -> bool:
    """Whether a model holds weights that are no floating-point numbers, which nothing can cast or cut."""
    return not all(parameter.is_floating_point() for parameter in model.parameters())


def _quantized(folder: str, precision: str) -> nn.Module:
    if precision == "int8":
        return load_in_8bit(folder)
    model: nn.Module = load_in_4bit(folder, precision)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        import bitsandbytes  # there, since the model is made of it

        for name, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit) and module.out_features % _CPU_BLOCK:
                raise ValueError(
                    f"Expected argument `teacher_precision` to fit the teacher, but got {precision!r}, whose kernels "
                    f"on a CPU take widths that {_CPU_BLOCK} divides; `{name}` has {module.out_features}. Use 'int8'."
                )
    return model


def cpu_capabilities() -> Mapping[str, Any]:
    """What instructions this machine's processor has, as :func:`torch.cpu.get_capabilities` says it."""
    known = getattr(torch.cpu, "get_capabilities", None)
    if known is not None:
        found: Mapping[str, Any] = known()
        return found
    # Before torch 2.13.
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
    return {"architecture": platform.machine(), "avx512_bf16": has_bf16}


def emulates_bf16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a processor has no instructions for bfloat16, so that each product is made of several in float32.

    Args:
        capabilities: See :func:`cpu_capabilities`.

    Returns:
        False also where nothing is known of such a processor.

    Example:
        >>> from lightning_distill.teachers.precision import emulates_bf16
        >>> emulates_bf16({"architecture": "x86_64", "avx2": True, "avx512_f": False})
        True
        >>> emulates_bf16({"architecture": "x86_64", "avx512_bf16": True})
        False
    """
    architecture = str(capabilities.get("architecture")).lower()
    if architecture not in ("x86_64", "amd64", "aarch64", "arm64"):
        return False
    return not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"))


def warn_of_slow_bf16(precision: str, models: Mapping[str, nn.Module | None], device: torch.device) -> None:
    """Say before the first step that a CPU without instructions for bfloat16 is to compute in it.

    Args:
        precision: The Trainer's.
        models: By role; None where there is none.
        device: Where they run.
    """
    if device.type != "cpu" or not emulates_bf16(cpu_capabilities()):
        return
    instead = {f"`precision='{precision}'`": "`precision='32-true'`"} if precision.startswith("bf16") else {}
    for role, model in models.items():
        if model is not None and any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
            instead[f"the {role} in bfloat16"] = f"the {role} in float32"
    if "the teacher in bfloat16" in instead:
        instead["the teacher in bfloat16"] += " (`teacher_precision=None`, or 'int8' to save memory)"
    if instead:
        warnings.warn(
            f"This CPU has no instructions for bfloat16 and emulates them, which made a step up to 50 times as long; "
            f"got {' and '.join(instead)}. Use {' and '.join(instead.values())}.",
            stacklevel=2,
        )


@contextmanager
def own_precision(precision: TeacherPrecision, device: torch.device) -> Iterator[torch.dtype]:
    """Run a teacher as if no precision plugin were there: no autocast, its own type for what it creates.

    Args:
        precision: What :func:`load_teacher` was called with.
        device: Where the teacher runs.

    Yields:
        The type of its floating-point inputs.

    Example:
        >>> import torch
        >>> from lightning_distill.teachers.precision import own_precision
        >>> with torch.autocast("cpu", torch.bfloat16), own_precision("32", torch.device("cpu")):
        ...     print((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        torch.float32
    """
    dtype, default = _DTYPES.get(precision, torch.float32), torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # bf16-true, 16-true and 64-true set their own around a step
    try:
        with torch.autocast(device.type, enabled=False):
            yield dtype
    finally:
        torch.set_default_dtype(default)


def computing_precision(teacher_precision: TeacherPrecision | None) -> str:
    """What a teacher would compute in, were it asked here: its own precision, that of autocast, or the default type.

    Args:
        teacher_precision: What :func:`load_teacher` was called with.

    Example:
        >>> import torch
        >>> from lightning_distill.teachers.precision import computing_precision
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     computing_precision(None), computing_precision("32")
        ('bfloat16', 'float32')
    """
    if teacher_precision is not None and teacher_precision not in _DTYPES:
        return teacher_precision
    kinds = ("cuda", "cpu", "mps", "xpu")
    cast = [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]
    own = None if teacher_precision is None else _DTYPES[teacher_precision]
    return str(own or [*cast, torch.get_default_dtype()][0]).removeprefix("torch.")


def cast_floats(batch: Any, dtype: torch.dtype) -> Any:
    """A batch whose floating-point tensors have another type; the others, and the structure, stay.

    Args:
        batch: Any nesting of mappings and sequences.
        dtype: The type.

    Example:
        >>> import torch
        >>> from lightning_distill.teachers.precision import cast_floats
        >>> [x.dtype for x in cast_floats((torch.ones(1), torch.arange(2)), torch.bfloat16)]
        [torch.bfloat16, torch.int64]
    """
    return apply_to_collection(batch, Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x)


def keeping_dtype(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``nn.Module.to`` does to each tensor, less the change of type.

    Args:
        convert: From a tensor to a tensor of perhaps another device and type.

    Example:
        >>> import torch
        >>> from lightning_distill.teachers.precision import keeping_dtype
        >>> keeping_dtype(torch.Tensor.half)(torch.ones(2)).dtype
        torch.float32
    """

    def moved(tensor: Tensor) -> Tensor:
        # Asked of an empty tensor, because a cast and a cast back would lose bits.
        probe = convert(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
        return convert(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

    return moved
