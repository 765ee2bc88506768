"""The teacher's classes in the student's order."""

import dataclasses

from torch import Tensor

from lightning_distill.functional.projection import TopK
from lightning_distill.signals.signals import Signals


class ClassOrder:
    """Puts the classes of a teacher's signals in the student's order: logits and, where they are all, the best k.

    Args:
        index: Int64 ``[classes]``, see :func:`lightning_distill.models.class_names.class_order`; None: they are in it.
        dim: The dimension of the logits that the classes are in: -1, or -2 where each has logits of its own.

    Example:
        >>> import torch
        >>> from lightning_distill.signals import Signals
        >>> from lightning_distill.teachers.class_order import ClassOrder
        >>> ClassOrder(torch.tensor([1, 0]))(Signals(torch.tensor([[3.0, 5.0]]))).logits
        tensor([[5., 3.]])
    """

    def __init__(self, index: Tensor | None = None, dim: int = -1) -> None:
        self.index, self.dim = index, dim

    def __call__(self, signals: Signals) -> Signals:
        """The same signals, with the classes of their logits in the student's order."""
        if self.index is None:
            return signals
        index = self.index.to(signals.logits.device)
        if not signals.top_k:
            return dataclasses.replace(signals, logits=signals.logits.index_select(self.dim, index))
        places = index.argsort()  # of each of the teacher's classes among the student's
        top_k = {t: TopK(best.log_probs, places[best.classes]) for t, best in signals.top_k.items()}
        return dataclasses.replace(signals, top_k=top_k)
