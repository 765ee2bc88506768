"""How a model is called on a batch, and where its logits are in what it returns."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from lightning_distill.models.batch import IGNORE_INDEX, LABEL_KEYS, labels_of
from lightning_distill.models.heads import task_of_class
from lightning_distill.models.wrapped import inside


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run a model on what it takes of a batch, not on the labels: it would compute a loss in vain.

    The decoder of an encoder-decoder that is given nothing else to read, reads the labels from its start token on.

    Raises:
        ValueError: If the batch lacks what the model has to be given.
    """
    if not isinstance(batch, Mapping):
        return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    names = accepted(model)
    given = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
    if (labels := labels_read(model, batch)) is not None:
        given["decoder_input_ids"] = decoder_input_ids(model, labels)
    inputs = {key: given[key] for key in taken_names(model, given)}
    missing = [
        name
        for name, parameter in names.items()
        if name not in (*inputs, "self") and parameter.kind not in _VARIABLE and parameter.default is parameter.empty
    ]
    if missing:
        if not inputs and len(missing) == len(given) == 1:
            # What they are called need not be what a plain module calls its one input.
            return model(*given.values())
        raise ValueError(
            f"Expected a batch with the inputs {missing} of `{type(model).__name__}.forward`, but got the keys "
            f"{list(batch)}. Give the batch these keys, or a pair (inputs, labels)."
        )
    if "use_cache" in names:
        inputs["use_cache"] = False
    return model(**inputs)


def labels_read(model: nn.Module, batch: Any) -> Tensor | None:
    """The labels ``[B, T]`` that the decoder of an encoder-decoder reads; None where it reads none.

    Args:
        model: Any model.
        batch: What it is called on.

    Raises:
        ValueError: If its decoder is given nothing to read.
    """
    reads = isinstance(batch, Mapping) and task_of_class(type(inside(model))) == "seq2seq_lm"
    if not reads or {"decoder_input_ids", "decoder_inputs_embeds"} & batch.keys():
        return None
    labels = labels_of(batch)
    if labels is None or labels.ndim != 2 or labels.is_floating_point():
        found = f"the keys {list(batch)}" if labels is None else f"{labels.dtype} of shape {list(labels.shape)}"
        raise ValueError(
            f"Expected a batch for `{type(inside(model)).__name__}` to have `labels` [rows, tokens], which its decoder "
            f"reads, or `decoder_input_ids`, but got {found}. To have text written call the model's `generate`."
        )
    return labels


def decoder_input_ids(model: nn.Module, labels: Tensor) -> Tensor:
    """What a decoder reads to answer labels: its start token, and the labels but the last.

    Args:
        model: An encoder-decoder of transformers.
        labels: Integers ``[B, T]``, -100 at padding.

    Returns:
        Integers ``[B, T]``, padded with the model's padding token.

    Raises:
        ValueError: If the model's config does not say where a decoder starts, or what padding is.
    """
    decoder: Any = inside(model)
    config = decoder.config
    start: Any = getattr(config, "decoder_start_token_id", None)
    padding: Any = getattr(config, "pad_token_id", None)
    # mBART's decoder starts with a row's last label, so a row without labels is given one to read.
    first = torch.arange(labels.shape[1], device=labels.device) == 0
    unlabelled = (labels == IGNORE_INDEX).all(1, keepdim=True)
    labels = labels.long().masked_fill(unlabelled & first, getattr(config, "eos_token_id", None) or 0)
    prepare = getattr(decoder, "prepare_decoder_input_ids_from_labels", None)
    try:
        if prepare is not None:
            read: Tensor = prepare(labels=labels)
            return read
        moved = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
        return moved.masked_fill(moved == IGNORE_INDEX, padding)
    except (TypeError, ValueError, RuntimeError) as error:
        if None not in (start, padding):
            raise
        raise ValueError(
            f"Expected the config of `{type(decoder).__name__}` to have `decoder_start_token_id` and `pad_token_id`, "
            f"with which its decoder reads the labels, but got {start} and {padding}. Set them to the tokenizer's, for "
            "example to its padding token for both, as T5 has it."
        ) from error


def taken_names(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """The names of the inputs that a model takes."""
    names = accepted(model)
    # Teacher and student may differ in what they take: DistilBERT has no token_type_ids. A transformers forward also
    # has **kwargs, but what it does not name it hands to the attention function.
    named_only = hasattr(model, "config") or not any(p.kind is p.VAR_KEYWORD for p in names.values())
    return [key for key in inputs if key in names or not named_only]


def accepted(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a model's forward; of a peft or a compiled model those of the model inside it."""
    model = inside(model)
    own = _parameters(getattr(model.forward, "__func__", model.forward))
    if hasattr(model, "config") and all(p.kind in _VARIABLE for name, p in own.items() if name != "self"):
        # A class of the user's own that hands everything on takes what the class it is derived from takes.
        derived = (_parameters(kind.forward) for kind in type(model).__mro__[1:] if hasattr(kind, "forward"))
        named = (names for names in derived if any(p.kind not in _VARIABLE for p in list(names.values())[1:]))
        return next(named, own)
    return own


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@lru_cache(maxsize=256)
def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    # Reading a signature takes as long as a small layer.
    return inspect.signature(forward).parameters


def gives_logits(model: nn.Module) -> bool:
    """Whether a model answers by logits, as far as its class says so: False for a transformers model without a head.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_distill.models.calling import gives_logits
        >>> gives_logits(BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))
        False
    """
    model = inside(model)
    if not hasattr(getattr(model, "config", None), "model_type"):
        return True
    if task_of_class(type(model)) is not None:
        return True
    # A forward of transformers says what it returns: a class of named tensors.
    try:
        returned = get_type_hints(type(model).forward).get("return")
    except (NameError, TypeError):  # a forward of the user's own, annotated by names that are not there
        return True
    outputs = [kind for kind in (get_args(returned) or (returned,)) if is_dataclass(kind)]
    return not outputs or any(field.name == "logits" for kind in outputs for field in fields(kind))


def no_logits(output: Any, *, of_tokens: bool) -> Tensor:
    """Logits of width 0, of a model that gives none: of each row or of each token."""
    first = next(value for value in output.values() if isinstance(value, Tensor))
    return (first if of_tokens else first.flatten(1))[..., :0]


def logits_of(output: Any) -> Tensor:
    """The logits in what a model's forward returned."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
    if not isinstance(logits, Tensor):
        raise TypeError(
            "Expected the model's forward to return logits: a tensor, a mapping with `logits`, or a tuple that starts "
            f"with them, but got {type(output).__name__}. Override `student_step` and `teacher_step`."
        )
    return logits


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Have models in eval, and each of their modules as it was when the block ends.

    Args:
        *models: The models.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.models.calling import evaluating
        >>> model = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.1).eval())
        >>> with evaluating(model):
        ...     print(model.training)
        False
        >>> model.training, model[0].training, model[1].training
        (True, True, False)
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
