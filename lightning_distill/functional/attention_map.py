"""Distances between attention maps of student and teacher."""

from typing import Literal

import torch
from torch import Tensor

from lightning_distill.functional.reduction import Reduction, check_same_shape, full_precision, reduce

AttentionDivergence = Literal["mse", "kl"]


def attention_map(
    student: Tensor,
    teacher: Tensor,
    *,
    divergence: AttentionDivergence = "mse",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Difference of two attention maps, a mean over the heads, of a query.

    With rows :math:`A_s, A_t` of a query over :math:`n` real keys:

    - ``"mse"``: :math:`\frac{1}{n} \lVert A_s - A_t \rVert^2`. Padding does not count as keys, so the value of a
      sentence does not depend on how far its batch is padded;
    - ``"kl"``: :math:`\mathrm{KL}(A_t \| A_s)`.

    Args:
        student: Probabilities ``[B, H, T, S]``, 0 at padded keys.
        teacher: Likewise.
        divergence: ``"mse"`` or ``"kl"``.
        mask: Bool ``[B, T]``, the real tokens; None where all are. Keys are taken to be the same tokens if T = S.
        reduction: ``"mean"`` over the queries that count, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B, T]`` with ``reduction="none"``; float32, or float64 for float64 maps.

    Raises:
        ValueError: If shapes differ or there is no such divergence.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[1.0, 0.0]]]])
        >>> functional.attention_map(student, teacher).item()
        0.25
        >>> round(functional.attention_map(student, teacher, divergence="kl").item(), 4)
        0.6931

    Source: Jiao et al., "TinyBERT", 2020 (MSE, there on the scores before the softmax); Wang et al., "MiniLM", 2020
    (KL).
    """
    check_same_shape(student, teacher, "student", "teacher")
    s, t = full_precision(student), full_precision(teacher)
    batch, _, queries, keys = s.shape
    if divergence == "mse":
        num_keys = torch.full((batch, 1), keys, device=s.device)
        if mask is not None and queries == keys:
            num_keys = mask.sum(-1, keepdim=True).clamp(min=1)
        values = (s - t).square().sum(-1).mean(1) / num_keys
    elif divergence == "kl":
        tiny = torch.finfo(s.dtype).tiny
        values = (torch.xlogy(t, t) - t * s.clamp(min=tiny).log()).sum(-1).mean(1)
    else:
        raise ValueError(f'Expected argument `divergence` to be "mse" or "kl", but got {divergence!r}.')
    counted = values.flatten() if mask is None else values[mask]
    return reduce(counted, values.shape, mask, reduction)
