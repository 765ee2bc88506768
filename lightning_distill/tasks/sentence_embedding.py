"""One vector a text, which other texts are found by."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_distill.functional.embeddings import candidate_scores
from lightning_distill.models.batch import labels_of
from lightning_distill.signals.signals import Signals
from lightning_distill.tasks.metrics import Pearson, Spearman
from lightning_distill.tasks.task import Task


class SentenceEmbedding(Task):
    """One vector a text, whose direction counts; student and teacher may give vectors of other widths.

    A row of a batch is one text, ``input_ids`` ``[B, T]``, and the teacher's vector all there is to learn; or several,
    ``[B, S, T]``: a pair, or a query and its candidates. So whatever splits a batch splits between rows, and tears no
    pair. Labels are the scores of pairs ``[B]``, from -1 to 1, or of candidates ``[B, S - 1]``. A candidate that is all
    padding is none, so that rows may have other numbers of them.

    Example:
        >>> import torch
        >>> from lightning_distill.tasks import TASKS
        >>> pairs = {"input_ids": torch.ones(4, 2, 5, dtype=torch.long), "labels": torch.rand(4)}
        >>> vectors, scores, texts = TASKS["sentence_embedding"].align(torch.randn(4, 2, 8), pairs)
        >>> vectors.shape, scores.shape, texts.shape
        (torch.Size([4, 2, 8]), torch.Size([4, 1]), torch.Size([4, 2]))
    """

    name = "sentence_embedding"
    has_classes = False
    of_vectors = True

    def align(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Vectors ``[B, D]`` or ``[B, S, D]``, scores ``[B, S - 1]``, the mask ``[B, S]`` of texts that are there."""
        texts = _texts(batch)
        if texts is not None and not logits.shape[-1]:
            logits = logits.new_empty(*texts.shape, 0)  # of rows, before a model has answered
        if logits.ndim not in ((2, 3) if texts is None else (3,)):
            raise ValueError(
                "Expected the answers of sentence_embedding to have the shape [rows, width], or [rows, texts, width] "
                f"for rows of several texts, but got {list(logits.shape)}. Give a model that pools: "
                "`EmbeddingModel.of(encoder)`."
            )
        labels = labels_of(batch)
        return logits, None if labels is None else self.targets(logits, labels), texts

    def _targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        candidates = logits.shape[1] - 1 if logits.ndim == 3 else 0
        if not candidates or labels.numel() != len(logits) * candidates or labels.dtype == torch.bool:
            raise ValueError(
                "Expected the labels of sentence_embedding to be a score for each pair of texts, beside `input_ids` "
                f"[rows, texts, tokens], but got {labels.dtype} of shape {list(labels.shape)} for embeddings "
                f"{list(logits.shape)}. Leave labels out where a row is one text."
            )
        return (labels if labels.dtype == torch.float64 else labels.float()).reshape(-1, candidates)

    def _any_label(self, labels: Tensor) -> bool:
        return True

    def check_batch(self, batch: Any, num_classes: int | None, where: str) -> None:
        """Refuse an empty text where there has to be one, and scores that no cosine can reach.

        Args:
            batch: The batch.
            num_classes: Means nothing here.
            where: Words that name the batch in the error.

        Raises:
            ValueError: If a text alone, a side of a pair, or a query or its first candidate is all padding, or the
                score of a pair is not in [-1, 1].
        """
        super().check_batch(batch, num_classes, where)
        mask, labels = batch.get("attention_mask") if isinstance(batch, Mapping) else None, labels_of(batch)
        if mask is not None:
            there = mask.bool().any(-1)
            needed = there if there.ndim == 1 else there[:, :2]
            if not bool(needed.all()):
                row = int((~needed).flatten(1).any(1).nonzero()[0]) if needed.ndim > 1 else int((~needed).nonzero()[0])
                raise ValueError(
                    f"Expected every text of {where} to have a real token, but one of row {row} is all padding. Leave "
                    "rows with an empty text out of the data."
                )
        if labels is None or labels.numel() != len(labels):
            return
        beyond = labels[~(labels.float().abs() <= 1)]
        if beyond.numel():
            raise ValueError(
                f"Expected the scores of {where} to be in [-1, 1], as cosines are, but got "
                f"{beyond.flatten()[0].item():g}. Divide them by the largest there can be, by 5 where they are 0 to 5."
            )

    def metric(self) -> tuple[str, Metric]:
        """Spearman's correlation of cosines and scores."""
        return "spearman", Spearman()

    def agreement_metric(self) -> Metric:
        """Pearson's correlation."""
        return Pearson()

    def agreement(self, student: Signals, teacher: Signals) -> tuple[Tensor, ...]:
        """The cosines of both, of the same texts; where a row is one text, of each two rows of a batch."""
        return _cosines(student), _cosines(teacher)

    def scored(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and scores of the pairs there are."""
        there = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask[:, :1] & mask[:, 1:]
        return candidate_scores(logits)[there], labels.float()[there]


def _texts(batch: Any) -> Tensor | None:
    """Bool ``[B, S]``, which texts of each row are there; None where a row is one text."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is None or ids.ndim != 3:
        return None
    mask = batch.get("attention_mask")
    return torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device) if mask is None else mask.bool().any(-1)


def _cosines(signals: Signals) -> Tensor:
    vectors = signals.logits.float()
    if vectors.ndim == 3:
        scores = candidate_scores(vectors)
        return scores.flatten() if signals.mask is None else scores[signals.mask[:, :1] & signals.mask[:, 1:]]
    unit = F.normalize(vectors, dim=-1)
    one, other = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
    return (unit[one] * unit[other]).sum(-1)
