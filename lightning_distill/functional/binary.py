"""One logit for two classes, written as the two logits it stands for."""

import torch
from torch import Tensor


def two_logits(logits: Tensor) -> Tensor:
    r"""The logits :math:`(0, z)` of the classes 0 and 1 that a single logit :math:`z` stands for.

    Their softmax is :math:`(1 - \sigma(z), \sigma(z))` and at every temperature that of :math:`z`, so cross entropy,
    divergences, the best class and its probability are those of the binary model.

    Args:
        logits: Shape ``[..., C]``.

    Returns:
        Shape ``[..., 2]`` where there is one logit; others as they are.

    Example:
        >>> import torch
        >>> from lightning_distill.functional.binary import two_logits
        >>> two_logits(torch.tensor([[3.0], [-1.0]])).tolist()
        [[0.0, 3.0], [0.0, -1.0]]
    """
    return torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits
