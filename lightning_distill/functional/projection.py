"""A prediction over a vocabulary that is not there as logits: what it would be computed of, or the best of it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_distill.functional.tensors import full_precision


@dataclass(frozen=True)
class Projection:
    """Logits that are not there yet: hidden states, and the linear layer that turns them into words.

    Args:
        hidden: Shape ``[..., D]``.
        weight: Shape ``[V, D]``.
        bias: Shape ``[V]``, or None.
        softcap: The logits become ``softcap * tanh(logits / softcap)``; None for as they are.
        scale: Factor of the logits, before the cap.

    Example:
        >>> import torch
        >>> from lightning_distill.functional.projection import Projection
        >>> Projection(torch.ones(2, 3), torch.ones(5, 3), scale=2.0).logits()[0].tolist()
        [6.0, 6.0, 6.0, 6.0, 6.0]
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def take(self, items: Any) -> "Projection":
        """The projection of some of the items: a slice, or a bool mask."""
        return replace(self, hidden=self.hidden[items])

    def flat(self) -> "Projection":
        """The projection of all items in one row."""
        return replace(self, hidden=self.hidden.flatten(0, -2))

    def logits(self) -> Tensor:
        """Logits ``[..., V]``, in float32, or in float64 for float64 inputs."""
        logits = full_precision(torch.nn.functional.linear(self.hidden, self.weight, self.bias))
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def write_logits(self, out: Tensor) -> Tensor:
        """The logits ``[N, V]`` of ``[N, D]`` hidden states, written over a tensor that is there, with no gradient.

        A fresh tensor for every chunk would cost a CPU as much as a tenth of the matrix product that fills it.
        """
        if self.hidden.dtype != out.dtype:
            out.copy_(torch.nn.functional.linear(self.hidden, self.weight, self.bias))
        else:
            torch.mm(self.hidden, self.weight.T, out=out)
            out = out if self.bias is None else out.add_(self.bias)
        out = out if self.scale == 1.0 else out.mul_(self.scale)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)


@dataclass(frozen=True)
class TopK:
    """A teacher's k best words of each token and the mass of all others.

    Args:
        log_probs: Log-probabilities ``[..., k]`` at the temperature of the loss, normalised over all words.
        classes: Integer ``[..., k]``, the words they belong to, each once.
    """

    log_probs: Tensor
    classes: Tensor

    def take(self, items: Any) -> "TopK":
        """The k best words of some of the items."""
        return TopK(self.log_probs[items], self.classes[items])

    def flat(self) -> "TopK":
        """The k best words of all items in one row."""
        return TopK(self.log_probs.flatten(0, -2), self.classes.flatten(0, -2))
