"""Large vocabularies: the linear layer of a language model that makes its logits, kept from making them all at once."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_distill.functional.projection import Projection
from lightning_distill.functional.tensors import whole

#: Words above which the logits of a batch are worth not having.
LARGE = 16_000


@dataclass(frozen=True)
class Head:
    """The linear layer that makes a model's logits, and what the model does to them after it.

    Args:
        linear: The layer.
        softcap: The model's ``config.final_logit_softcapping``.
        scale: The model's ``config.logit_scale``, or one over its ``config.logits_scaling``.
        logits_bias: What the model adds to the logits ``[1, V]``: BART's and Marian's ``final_logits_bias``.
    """

    linear: nn.Linear
    softcap: float | None
    scale: float
    logits_bias: Tensor | None = None

    def projection(self, hidden: Tensor) -> Projection:
        """The logits of hidden states ``[..., D]``, not yet computed; a sharded weight is gathered."""
        weight = whole(self.linear.weight)
        bias = None if self.linear.bias is None else whole(self.linear.bias)
        if self.logits_bias is not None:
            more = self.logits_bias.flatten().to(weight.dtype)
            bias = more if bias is None else bias + more
        return Projection(hidden, weight, bias, self.softcap, self.scale)

    def call(self, function: Callable[[Projection], Tensor], hidden: Tensor) -> Tensor:
        """What a function makes of the logits, with the layer called as a module.

        So its hooks run, and with them those of FSDP2, which gather its weight before and spread its gradient after.
        """
        with _forward(self.linear, lambda inner: function(self.projection(inner))):
            result: Tensor = self.linear(hidden)
        return result


@dataclass(frozen=True)
class Deferred:
    """Logits that were not computed.

    Args:
        head: The layer that would.
        hidden: Its input ``[B, T, D]``.
        vocab_size: How many of its words there are, where the last ones are padding; None for all.
    """

    head: Head
    hidden: Tensor
    vocab_size: int | None = None


def find_head(model: nn.Module | None) -> Head | None:
    """The head of a transformers language model with a large vocabulary; None where there is no plain linear layer.

    Args:
        model: Any model.

    Returns:
        The head, or None.

    Example:
        >>> from torch import nn
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_distill.signals.head import find_head
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> find_head(LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes))).linear
        Linear(in_features=8, out_features=32000, bias=False)
        >>> find_head(LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))) is None
        True
    """
    config: Any = getattr(model, "config", None)
    find: Any = getattr(model, "get_output_embeddings", None)
    linear: Any = None if config is None or find is None else find()
    # A quantised layer, or one with an adapter, is another class: what it computes is its own affair. FSDP2 makes a
    # class of its own and the layer's.
    kind = type(linear).__mro__[2] if isinstance(linear, FSDPModule) else type(linear)
    # A teacher whose answers are read from a cache has no weights.
    if kind is not nn.Linear or linear.weight is None or len(linear.weight) <= LARGE:
        return None
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    bias = getattr(model, "final_logits_bias", None)
    return Head(linear, getattr(config, "final_logit_softcapping", None), scale, bias)


@contextmanager
def withheld(heads: Mapping[str, Head]) -> Iterator[dict[str, Tensor]]:
    """Let models run without making their logits.

    In the place of all logits the head gives those of the first token alone, so that what the model does to them after
    can be seen (see :func:`is_known`).

    Args:
        heads: By the role of their model.

    Yields:
        The input of each head that has run since, by role.
    """
    kept: dict[str, Tensor] = {}

    def keep(role: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            kept[role] = hidden
            return torch.nn.functional.linear(hidden[:1, :1], linear.weight, linear.bias)

        return forward

    with ExitStack() as stack:
        for role, head in heads.items():
            stack.enter_context(_forward(head.linear, keep(role, head.linear)))
        yield kept


def is_known(head: Head, hidden: Tensor, logits: Tensor) -> bool:
    """Whether the model did to its first token's logits what we think it does.

    Args:
        head: The model's head.
        hidden: The head's input ``[B, T, D]``.
        logits: The model's output ``[1, 1, V]``.

    Returns:
        True if the two agree as closely as their type allows.
    """
    ours = head.projection(hidden[:1, :1].detach()).logits()
    tolerance = 8 * torch.finfo(logits.dtype).eps
    scale = ours.abs().max()
    return logits.shape == ours.shape and bool(((ours - logits.detach()).abs() <= tolerance * scale.clamp(min=1)).all())


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for one module, on the instance, so that the module and its hooks are called as ever."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
