"""What tells one model, or one tokenizer, from another."""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_distill.models.wrapped import inside

_BYTES = 16

# What a config says beside what its model computes.
_NO_MATTER = {
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id",
    "problem_type", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "_attn_implementation",
}  # fmt: skip


def model_fingerprint(model: nn.Module) -> str:
    """A hash of a model's layers, of the settings they were made with, and of every weight's type, shape and content.

    What a module was made with is what its ``extra_repr`` says, and the plain values among its attributes that are
    named as arguments of its ``__init__``. What does nothing outside of training (dropout) is left out.

    Args:
        model: The model.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.models.fingerprints import model_fingerprint
        >>> model_fingerprint(nn.Sequential(nn.ReLU())) == model_fingerprint(nn.Sequential(nn.Tanh()))
        False
    """
    if (of_cache := getattr(model, "cached_fingerprint", None)) is not None:
        return str(of_cache)
    model = inside(model)  # what `torch.compile` wraps gives the same
    digest = hashlib.blake2b(digest_size=_BYTES)
    configs: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.dropout._DropoutNd):
            kind = type(module).__name__.removeprefix("FSDP")
            said = json.dumps([name, kind, module.extra_repr(), *_settings(module, configs)])
            digest.update(re.sub(r" at 0x[0-9a-f]+", "", said).encode())
    tensors = ((name, value) for name, value in sorted(model.state_dict().items()) if isinstance(value, Tensor))
    add_tensors(digest, ((f"{name}:{value.dtype}:{list(value.shape)}", value) for name, value in tensors))
    return digest.hexdigest()


def add_tensors(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add tensors to a hash: what each is called, then its bytes.

    Args:
        digest: A hash of ``hashlib``.
        tensors: Names and tensors, in an order that does not change.

    Example:
        >>> import hashlib
        >>> import torch
        >>> from lightning_distill.models.fingerprints import add_tensors
        >>> digest = hashlib.sha256()
        >>> add_tensors(digest, [("weight", torch.zeros(2, dtype=torch.int8))])
        >>> digest.digest() == hashlib.sha256(b"weight" + bytes(2)).digest()
        True
    """
    for name, tensor in tensors:
        digest.update(name.encode())
        tensor = tensor.detach().cpu().contiguous()
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")


def _settings(module: nn.Module, configs: set[int]) -> Iterator[str]:
    for name in inspect.signature(type(module).__init__).parameters:
        value = vars(module).get(name)
        if isinstance(value, transformers.PretrainedConfig):
            if id(value) not in configs:  # each layer holds it
                configs.add(id(value))
                yield json.dumps(_of_config(value.to_dict()), sort_keys=True, default=str)
        elif isinstance(value, (bool, int, float, str, list, tuple, torch.dtype)) and "dropout" not in name:
            yield f"{name}={value!r}"
        elif inspect.isroutine(value) and not inspect.ismethod(value):
            yield f"{name}={getattr(value, '__qualname__', '')}"


def _of_config(values: Any) -> Any:
    if isinstance(values, dict):
        kept = {key: value for key, value in values.items() if key not in _NO_MATTER and "drop" not in str(key)}
        return {str(key): _of_config(value) for key, value in kept.items()}
    return values


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """A hash of a tokenizer's words; None without one, and of an image processor, whose work is in the pixels."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(words.encode(), digest_size=_BYTES).hexdigest()
