"""Gradient accumulation whose gradient is the mean over all items of a step, however they are split into batches."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from lightning_distill.functional.clipping import group_tensors, scale_


class AccumulationWindow:
    """The batches since the last optimizer step.

    Lightning averages the means of the batches, so a token of a batch with few would weigh more. Here the gradient is
    at any time the mean over all items so far: that of the earlier batches shrinks to the share they have now.
    """

    def __init__(self) -> None:
        # How much each objective has counted since the last optimizer step, and the share of it before this batch.
        self._counts: Tensor | None = None
        self._earlier_share: Tensor | None = None

    def add(self, losses: dict[str, Tensor], counts: Tensor, place: int, size: int) -> dict[str, Tensor]:
        """Take a batch in.

        Args:
            losses: Means over the batch, by objective.
            counts: What each is a mean over, shape ``[objectives]``.
            place: Number of the batch in the window, from 0.
            size: Batches of a window.

        Returns:
            The losses times the batch's share of all items so far.
        """
        earlier = self._counts if place else None
        total = counts if earlier is None else earlier + counts
        self._earlier_share = None if earlier is None else earlier / total
        self._counts = total
        # Lightning divides the loss by the number of batches, which here is done already.
        shares = size * counts / total
        return {name: loss * share for (name, loss), share in zip(losses.items(), shares, strict=True)}

    def shrink_earlier(self, parameters: Iterable[nn.Parameter], weights: Sequence[float]) -> None:
        """Shrink the gradient of the earlier batches to the share they have now; called before each backward.

        Args:
            parameters: Those that have gradients.
            weights: Of the objectives.
        """
        share, self._earlier_share = self._earlier_share, None
        if share is None:
            return
        # One factor for all objectives: exact where they count the same, as all on logits do.
        weight = share.new_tensor(weights)
        share = (share * weight).sum() / weight.sum()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:  # none where the step is left out
            scale_(group_tensors(gradients), share.to(gradients[0].dtype))
