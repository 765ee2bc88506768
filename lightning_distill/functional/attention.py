"""Queries, keys and values of one attention function, and what follows from them: scores and maps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.functional.tensors import full_precision


@dataclass
class Attention:
    """What one attention function was called with, grouped heads expanded, position embeddings applied.

    Args:
        query: Shape ``[B, H, T, D]``.
        key: Shape ``[B, H, S, D]``.
        value: Shape ``[B, H, S, D]``.
        mask: As the attention function received it: None, or broadcastable to ``[B, H, T, S]``, bool (True attends)
            or added to the scores.
        scaling: Factor of the scores.
        is_causal: Whether a query sees only keys up to its own position; where there is a mask, it says so already.
        position_bias: Added to the scores (T5), broadcastable to ``[B, H, T, S]``, or None.

    Example:
        >>> import torch
        >>> from lightning_distill.functional.attention import Attention
        >>> q = torch.ones(1, 1, 2, 4)
        >>> Attention(q, q, q, mask=None, scaling=0.5, is_causal=True).probabilities().tolist()
        [[[[1.0, 0.0], [0.5, 0.5]]]]
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    is_causal: bool
    position_bias: Tensor | None = None

    def probabilities(self) -> Tensor:
        """The attention map ``[B, H, T, S]``, float32 (float64 where the query is), each row of sum 1."""
        return self.scores().softmax(-1)

    def scores(self, batch: slice = slice(None), queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """What the softmax is taken of, the lowest number where a query does not see a key.

        Args:
            batch: Rows of the batch to compute.
            queries: Queries to compute.
            keys: Keys to compute.

        Returns:
            Shape ``[rows, H, queries, keys]``, float32, or float64 for a float64 query.
        """
        query, key = full_precision(self.query[batch, :, queries]), full_precision(self.key[batch, :, keys])
        with torch.autocast(query.device.type, enabled=False):
            scores = (query * self.scaling) @ key.transpose(-1, -2)
        if self.position_bias is not None:
            scores = scores + _block(self.position_bias, batch, queries, keys)
        # Not -inf: a row that sees no key at all (left padding) is uniform instead of NaN.
        lowest = torch.finfo(scores.dtype).min
        if self.mask is None:
            if self.is_causal:
                positions = torch.arange(self.query.shape[2], device=scores.device)[queries]
                seen = torch.arange(self.key.shape[2], device=scores.device)[keys]
                scores = scores.masked_fill_(seen > positions[:, None], lowest)
        elif self.mask.dtype == torch.bool:
            scores = scores.masked_fill_(~_block(self.mask, batch, queries, keys), lowest)
        else:
            scores = (scores + _block(self.mask, batch, queries, keys)).clamp(min=lowest)
        return scores


def _block(x: Tensor, batch: slice, queries: slice, keys: slice) -> Tensor:
    """Rows, queries and keys of something that is broadcast to ``[B, H, T, S]``."""
    batch, queries, keys = (
        part if x.shape[dim] > 1 else slice(None) for dim, part in ((0, batch), (2, queries), (3, keys))
    )
    return x[batch, :, queries, keys]
