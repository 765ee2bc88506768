"""The objective for a teacher that reads text in other words than the student."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill import functional
from lightning_distill.arguments import typed
from lightning_distill.functional.universal_logit import counted_pieces, first_pieces
from lightning_distill.objectives.logits import require_labels
from lightning_distill.objectives.objective import Loss, Objective
from lightning_distill.objectives.schedule import Scheduled
from lightning_distill.signals.signals import Signals


@typed
class UniversalLogit(Objective):
    """Distance of sorted probabilities, see :func:`lightning_distill.functional.universal_logit`.

    Teacher and student may have different vocabularies and cut the same text into different tokens. The batch then has
    the teacher's own inputs as ``teacher_input_ids``, ``teacher_attention_mask`` and ``teacher_labels`` beside the
    student's.

    Where the batch also has ``offset_mapping`` and ``teacher_offset_mapping`` ``[B, T, 2]``, as fast tokenizers give
    them, the pieces of a word that one of them splits are merged, and the loss is one per stretch of text that both cut
    out, see :func:`lightning_distill.functional.merged_universal_logit`. A stretch counts if all its tokens have
    labels. Without offsets, in each row the first token that counts is compared with the teacher's first, the second
    with the second, as far as the shorter one goes, as in the paper.

    Sorted probabilities say how sure to be and not of what: use them beside :class:`HardLabel`.

    Args:
        words: The student's and the teacher's number of each word that both have, pairs without repetition; compared
            each with its own and not sorted. :func:`lightning_distill.functional.matched_words` finds them.
        matched_weight: Factor of what is compared directly, finite and at least 0.
        unmatched_weight: Factor of the sorted distance, finite and at least 0.
        weight: Factor of the loss in the total; a number or a schedule.
        name: What it is logged as.

    Raises:
        ValueError: If an argument is out of its range, or a batch has the offsets of one model alone, or no labels
            beside them.

    Example:
        >>> import torch
        >>> from lightning_distill.objectives import UniversalLogit
        >>> from lightning_distill.signals.signals import Signals
        >>> student, teacher = torch.zeros(1, 3, 2), torch.tensor([[[-100.0, 0.0, -100.0]] * 2])
        >>> loss = UniversalLogit()(Signals(student), Signals(teacher))
        >>> loss.count().item(), loss.mean().item()
        (2, 1.0)
    """

    any_vocabulary, needs_classes = True, True

    def __init__(
        self,
        words: Sequence[Sequence[int]] | Tensor | None = None,
        *,
        matched_weight: float = 1.0,
        unmatched_weight: float = 1.0,
        weight: Scheduled = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        for argument, factor in (("matched_weight", matched_weight), ("unmatched_weight", unmatched_weight)):
            if not 0 <= factor < float("inf"):
                raise self._error(argument, "finite and at least 0", factor)
        self.matched_weight, self.unmatched_weight = matched_weight, unmatched_weight
        pairs = None if words is None else torch.as_tensor(words, dtype=torch.long).reshape(len(words), -1)
        if pairs is not None and (
            pairs.shape[1:] != (2,)
            or bool((pairs < 0).any())
            or any(len(side.unique()) < len(pairs) for side in pairs.T)
        ):
            raise self._error("words", "pairs of words, the student's and the teacher's, each once", words)
        # No state: the models' checkpoint must load where other words are given.
        self.register_buffer("words", pairs, persistent=False)

    def count(self, student: Signals, teacher: Signals) -> Tensor:
        """Rows, tokens or stretches that both have."""
        if self._has_offsets(student, teacher):
            labels, spans = self._labels_and_spans(student, teacher)
            return first_pieces(spans[0], counted_pieces(*labels, *spans)[0]).sum()
        return _paired(_mask(student), _mask(teacher))[0].sum()

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        """Distance per row, per token or, at its first token, per stretch."""
        options: dict[str, Any] = {
            "words": self.words,
            "matched_weight": self.matched_weight,
            "unmatched_weight": self.unmatched_weight,
            "reduction": "none",
        }
        if self._has_offsets(student, teacher):
            labels, spans = self._labels_and_spans(student, teacher)
            values = functional.merged_universal_logit(student.logits, teacher.logits, *labels, *spans, **options)
            return Loss(values, first_pieces(spans[0], counted_pieces(*labels, *spans)[0]))
        mask, of_teacher = _paired(_mask(student), _mask(teacher))
        distances = functional.universal_logit(student.logits[mask], teacher.logits[of_teacher], **options)
        return Loss(distances.new_zeros(mask.shape).masked_scatter(mask, distances), mask)

    def _has_offsets(self, student: Signals, teacher: Signals) -> bool:
        if (student.offsets is None) != (teacher.offsets is None):
            raise ValueError(
                f"Expected objective `{self.name}` to be given the offsets of both models, but got those of "
                f"{'the teacher' if student.offsets is None else 'the student'} alone. Add `offset_mapping` and "
                "`teacher_offset_mapping` to the batch, or neither."
            )
        return student.offsets is not None

    def _labels_and_spans(self, student: Signals, teacher: Signals) -> tuple[list[Tensor], list[Tensor]]:
        labels, offsets, spans = [], [], []
        for signals in (student, teacher):
            own = require_labels(self, signals)
            labels.append(own if signals.mask is None else own.masked_fill(~signals.mask, functional.IGNORE_INDEX))
            assert signals.offsets is not None
            real = signals.real_tokens(None)
            offsets.append(signals.offsets if real is None else signals.offsets * real[..., None])
        for given, own in zip(functional.shared_spans(*offsets), labels, strict=True):
            # A causal model does not predict the first token, and so not the stretch that begins with it.
            lost = given.shape[1] - own.shape[1]
            if lost not in (0, 1):
                raise ValueError(
                    f"Expected objective `{self.name}` to be given one pair of offsets per token of the input, but got "
                    f"{given.shape[1]} for {own.shape[1]} labels."
                )
            rest = given[:, lost:]
            spans.append(rest.masked_fill((rest[:, None] == given[:, :lost, None]).any(1), -1))
        return labels, spans


def _mask(signals: Signals) -> Tensor:
    if signals.mask is not None:
        return signals.mask
    return torch.ones(signals.logits.shape[:-1], dtype=torch.bool, device=signals.logits.device)


def _paired(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Of two masks with the same rows, the first items of each row, as many as the other one has too."""
    if student.ndim == 1:
        return student & teacher, student & teacher
    counts = torch.minimum(student.sum(1), teacher.sum(1))[:, None]
    return student & (student.cumsum(1) <= counts), teacher & (teacher.cumsum(1) <= counts)
