"""A sequence from a sequence: the words that a decoder writes, each after those before it."""

from typing import Any

from torch import Tensor

from lightning_distill.models.batch import IGNORE_INDEX, decoder_token_mask
from lightning_distill.tasks.language_models import LanguageModel
from lightning_distill.tasks.task import labelled_tokens


class Seq2SeqLM(LanguageModel):
    """The words of a target, each told from the source and the words before it (T5, BART, Marian).

    Labels ``[B, T]`` are the target's words, -100 at padding; T is the decoder's length, not the source's. Nothing is
    moved: the decoder reads the labels from its start token on, so its logits at t answer the label at t.

    Example:
        >>> import torch
        >>> from lightning_distill.tasks import TASKS
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[4, -100]])}
        >>> logits, labels, mask = TASKS["seq2seq_lm"].align(torch.zeros(1, 2, 8), batch)
        >>> labels.tolist(), mask.tolist()
        ([[4, -100]], [[True, False]])
    """

    name = "seq2seq_lm"
    # Marian's and FSMT's decoder may write in a vocabulary of its own.
    num_classes_fields = ("decoder_vocab_size", "tgt_vocab_size", "vocab_size")

    def align(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See :meth:`Task.align`: words with a label count; without labels, the real tokens that the decoder reads."""
        logits, labels, _ = labelled_tokens(self, logits, batch)
        if labels is None or labels.is_floating_point():
            return logits, labels, decoder_token_mask(batch)
        return logits, labels, labels != IGNORE_INDEX
