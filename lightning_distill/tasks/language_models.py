"""One word a token: masked and causal language models."""

from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import Perplexity

from lightning_distill.models.batch import IGNORE_INDEX
from lightning_distill.tasks.task import Task, labelled_tokens


class LanguageModel(Task):
    """What tasks have in common whose classes are words."""

    of_tokens = True
    of_words = True
    num_classes_fields: ClassVar[tuple[str, ...]] = ("vocab_size",)

    def metric(self) -> tuple[str, Metric]:
        """Perplexity."""
        return "perplexity", Perplexity(ignore_index=IGNORE_INDEX)

    def scored(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits ``[B, T, C]`` and labels ``[B, T]``: perplexity masks by itself."""
        return logits.float(), labels


class MaskedLM(LanguageModel):
    """The words under the masks; without labels every real token counts."""

    name = "masked_lm"

    def align(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See :meth:`Task.align`: tokens with a label count."""
        logits, labels, real = labelled_tokens(self, logits, batch)
        if labels is None or labels.is_floating_point():
            return logits, labels, real
        return logits, labels, labels != IGNORE_INDEX


class CausalLM(LanguageModel):
    """The next word; without labels a batch answers itself.

    Example:
        >>> import torch
        >>> from lightning_distill.tasks import TASKS
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> logits, labels, mask = TASKS["causal_lm"].align(torch.zeros(1, 3, 8), batch)
        >>> logits.shape, labels.tolist(), mask.tolist()
        (torch.Size([1, 2, 8]), [[6, -100]], [[True, False]])
    """

    name = "causal_lm"
    labels_itself = True

    def align(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits at t answer the token at t + 1: they lose their last position, and the labels their first."""
        logits, labels, real = labelled_tokens(self, logits, batch)
        assert labels is not None
        if real is not None:
            labels = labels.masked_fill(~real, IGNORE_INDEX)
        logits, labels = logits[:, :-1], labels[:, 1:]
        if labels.is_floating_point():
            return logits, labels, real
        return logits, labels, labels != IGNORE_INDEX
