"""What one forward leaves behind, for only the layers and kinds that are asked for.

The model keeps its own fast attention. Hidden states come from hooks on the layers that are asked for; queries, keys
and values come from an attention function that is registered with transformers, calls the model's own one and keeps
what it was called with.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TypedDict

from torch import Tensor

from lightning_distill.functional.attention import Attention
from lightning_distill.functional.projection import TopK
from lightning_distill.signals.head import Deferred


@dataclass(frozen=True)
class Request:
    """The signals of one model that somebody reads.

    Args:
        hidden_states: Layers (from 0) whose output is kept.
        embedding: Whether the input of the first layer is kept.
        attention: Layers (from 0), or paths of layers, whose queries, keys and values are kept.
        modules: Paths of submodules whose output is kept.

    Example:
        >>> from lightning_distill.signals.signals import Request
        >>> sorted((Request(hidden_states=frozenset({1})) | Request(hidden_states=frozenset({0}))).hidden_states)
        [0, 1]
    """

    hidden_states: frozenset[int] = frozenset()
    embedding: bool = False
    attention: frozenset[int | str] = frozenset()
    modules: frozenset[str] = frozenset()

    def __or__(self, other: "Request") -> "Request":
        return Request(*(getattr(self, f.name) | getattr(other, f.name) for f in dataclasses.fields(self)))


class Captured(TypedDict):
    """What a :class:`Recorder` hands over; the keys are the fields of :class:`Signals`."""

    hidden_states: dict[int, Tensor]
    embedding: Tensor | None
    attention: dict[int | str, Attention]
    modules: dict[str, Tensor]


@dataclass
class Signals:
    """What one forward of one model left behind.

    Args:
        logits: Shape ``[B, C]`` or ``[B, T, C]``.
        labels: Shape of the logits without their last dimension; where they are probabilities of classes, or of several
            values in regression, that of the logits. None where there are none.
        mask: Bool, where the logits count; shape of the labels, or None where all count.
        token_mask: Bool ``[B, T]``, the real tokens of the input, or None where all are.
        hidden_states: Output ``[B, T, D]`` of a layer, by layer (from 0). The last layer's is the output of the whole
            stack, so after its final norm where it has one, as in transformers' ``last_hidden_state``.
        embedding: Input ``[B, T, D]`` of the first layer.
        attention: Queries, keys and values, by layer or its path.
        modules: Output of a submodule, by its path.
        decoder: Path of the decoder of an encoder-decoder, see :func:`find_decoder`.
        decoder_token_mask: Bool ``[B, T]``, the real tokens that the decoder reads, or None where all are.
        top_k: The k best classes of a teacher whose logits were not kept, by temperature; those above then have
            width 0.
        deferred: Logits over a large vocabulary that were not computed; those above then have width 0.
        regression: Whether the logits are real values, each with a label of its own, and no classes.
        vectors: Whether the logits are embeddings ``[B, D]``, or ``[B, S, D]`` where a row has several texts, whose
            mask is then ``[B, S]``, and whose labels are scores ``[B, S - 1]`` of the first text with each other one.
        offsets: Integer ``[B, T, 2]``, where in the text each token of the input begins and ends; None where the batch
            does not say.
    """

    logits: Tensor
    labels: Tensor | None = None
    mask: Tensor | None = None
    token_mask: Tensor | None = None
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None
    attention: dict[int | str, Attention] = field(default_factory=dict)
    modules: dict[str, Tensor] = field(default_factory=dict)
    decoder: str | None = None
    decoder_token_mask: Tensor | None = None
    top_k: dict[float, TopK] = field(default_factory=dict)
    deferred: Deferred | None = None
    regression: bool = False
    vectors: bool = False
    offsets: Tensor | None = None

    def real_tokens(self, key: int | str | None) -> Tensor | None:
        """Bool mask of the tokens that a layer, or the module at a path, reads; None where all are real."""
        return self.decoder_token_mask if is_within(key, self.decoder) else self.token_mask


def is_within(key: int | str | None, path: str | None) -> bool:
    """Whether a key is the path of a module or of something inside it."""
    return isinstance(key, str) and path is not None and f"{key}.".startswith(f"{path}.")
