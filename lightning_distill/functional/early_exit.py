r"""How sure an early exit is of its answer: one number per row (or per token), from its logits.

A single logit is that of the second of two classes.
"""

import math

import torch
from torch import Tensor

from lightning_distill.functional.binary import two_logits
from lightning_distill.functional.tensors import full_precision


def confidence(logits: Tensor) -> Tensor:
    r"""Largest probability, :math:`\max_c p_c` with :math:`p = \mathrm{softmax}(z)`.

    Args:
        logits: Shape ``[..., C]``.

    Returns:
        Shape ``[...]``, between 1 / C and 1; NaN where a logit is not finite.

    Example:
        >>> import torch
        >>> from lightning_distill.functional import confidence
        >>> confidence(torch.tensor([[0.0, 0.0], [100.0, -100.0]]))
        tensor([0.5000, 1.0000])
    """
    return full_precision(two_logits(logits)).softmax(-1).amax(-1)


def normalized_entropy(logits: Tensor) -> Tensor:
    r"""Entropy as a share of the largest there can be, :math:`-\sum_c p_c \log p_c / \log C`.

    Args:
        logits: Shape ``[..., C]``.

    Returns:
        Shape ``[...]``, between 0 (sure) and 1; NaN where a logit is not finite.

    Example:
        >>> import torch
        >>> from lightning_distill.functional import normalized_entropy
        >>> normalized_entropy(torch.tensor([[0.0, 0.0], [100.0, -100.0]]))
        tensor([1., 0.])

    Source: Xin et al., "DeeBERT", 2020.
    """
    probabilities = full_precision(two_logits(logits)).softmax(-1)
    # entr(0) is 0, where -p log p written out is NaN.
    return torch.special.entr(probabilities).sum(-1) / math.log(probabilities.shape[-1])


def margin(logits: Tensor) -> Tensor:
    r"""Distance of the two largest probabilities.

    Args:
        logits: Shape ``[..., C]``.

    Returns:
        Shape ``[...]``, between 0 and 1 (sure); NaN where a logit is not finite.

    Example:
        >>> import torch
        >>> from lightning_distill.functional import margin
        >>> margin(torch.tensor([0.25, 0.75, 0.0]).log())
        tensor(0.5000)
    """
    first, second = full_precision(two_logits(logits)).softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


def agreement_run(
    logits: Tensor, previous: Tensor, run: Tensor, tolerance: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""How many exits in a row gave the same answer.

    An answer that is not finite agrees with nothing.

    Args:
        logits: Shape ``[..., C]``; with a tolerance ``[..., 1]``.
        previous: The last exit's answer, shape ``[...]``; NaN before the first.
        run: Agreements in a row so far, shape ``[...]``.
        tolerance: In regression, answers nearer than this are the same; None compares classes.

    Returns:
        This exit's answer and the agreements in a row, both of shape ``[...]``.

    Example:
        >>> import torch
        >>> from lightning_distill.functional import agreement_run
        >>> agreement_run(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]))
        (tensor([1., 0.]), tensor([3., 0.]))

    Source: Zhou et al., "BERT Loses Patience", 2020.
    """
    answer = full_precision(
        logits.squeeze(-1) if tolerance is not None else two_logits(logits).argmax(-1).to(run.dtype)
    )
    answer = answer.masked_fill(~logits.isfinite().all(-1), math.nan)
    same = answer == previous if tolerance is None else (answer - previous).abs() < tolerance
    return answer, torch.where(same, run + 1, torch.zeros_like(run))
