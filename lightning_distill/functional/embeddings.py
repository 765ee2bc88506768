"""Losses on embeddings, and on the scores of candidates that embeddings or a reranker give.

An embedding is a vector ``[D]`` of one text. Where a row has several texts, ``[B, S, D]``, its first is the query (or
one side of a pair) and the others are its candidates (or the other side).
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.functional.reduction import Reduction, check_same_shape, reduce, select
from lightning_distill.functional.tensors import full_precision

Similarity = Literal["cosine", "dot"]


def candidate_scores(embeddings: Tensor, similarity: Similarity = "cosine", *, mask: Tensor | None = None) -> Tensor:
    """How similar the first text of each row is to each of the others.

    Args:
        embeddings: Shape ``[B, S, D]``.
        similarity: ``"cosine"``, which is 0 beside a vector of zeros, or ``"dot"``, the inner product.
        mask: Bool ``[B, S]``, the texts there are; the vectors of others are read as zeros. None where all are.

    Returns:
        Shape ``[B, S - 1]``, float32, or float64 for float64 embeddings.

    Raises:
        ValueError: If there is no such similarity, or the shape is another one.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> functional.candidate_scores(torch.tensor([[[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]]]))
        tensor([[1., 0.]])
    """
    if similarity not in get_args(Similarity):
        raise ValueError(f"Expected argument `similarity` to be one of {get_args(Similarity)}, but got {similarity!r}.")
    if embeddings.ndim != 3 or embeddings.shape[1] < 2:
        raise ValueError(
            "Expected argument `embeddings` to have the shape [rows, texts, width] with two texts or more, but got "
            f"{list(embeddings.shape)}."
        )
    vectors = full_precision(embeddings)
    vectors = vectors if mask is None else vectors.masked_fill(~mask[..., None], 0.0)
    vectors = F.normalize(vectors, dim=-1) if similarity == "cosine" else vectors
    return (vectors[:, :1] * vectors[:, 1:]).sum(-1)


def embedding_similarity(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Mean squared difference of the cosines between all texts of a batch.

    The value of text :math:`i` is :math:`\frac{1}{N} \sum_j (\cos(s_i, s_j) - \cos(t_i, t_j))^2`, over all N texts
    (with :math:`j = i`, which adds 0). It changes with the batch; widths may differ.

    Args:
        student: Shape ``[B, D_s]`` or ``[B, S, D_s]``.
        teacher: Shape ``[B, D_t]`` or ``[B, S, D_t]``.
        mask: Bool, of their shape without the width, the texts that count; None where all do.
        reduction: ``"mean"`` over texts, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or with ``reduction="none"`` the shape of the texts.

    Raises:
        ValueError: If the numbers of texts differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.tensor([[1.0], [2.0]]), torch.eye(2)
        >>> functional.embedding_similarity(student, teacher).item()
        0.5

    Source: the cosine form of Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019; of embeddings see
    Park et al., "Relational Knowledge Distillation", 2019.
    """
    check_same_shape(student[..., 0], teacher[..., 0], "student", "teacher")
    cosines = []
    for vectors in select(mask, student, teacher):
        unit = F.normalize(vectors, dim=-1)
        with torch.autocast(unit.device.type, enabled=False):
            cosines.append(unit @ unit.T)
    values = (cosines[0] - cosines[1]).square().sum(1) / max(len(cosines[0]), 1)
    return reduce(values, student.shape[:-1], mask, reduction)


def margin_mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Squared difference of the margins between a query's first candidate and each of the others.

    :math:`((s_0 - s_j) - (t_0 - t_j))^2` for :math:`j \ge 1`, where candidate 0 is the positive one. Only differences
    count, so scores of other sizes and offsets (a cross-encoder's logits, inner products) can be compared.

    Args:
        student: Scores ``[B, C]`` of at least two candidates.
        teacher: Likewise.
        mask: Bool ``[B, C]``, the candidates there are; None where all are. A margin counts where both of its
            candidates are there.
        reduction: ``"mean"`` over margins, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B, C - 1]`` with ``reduction="none"``.

    Raises:
        ValueError: If shapes differ, or there is one candidate alone.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> functional.margin_mse(torch.tensor([[0.5, 0.5]]), torch.tensor([[9.0, 8.0]])).item()
        1.0

    Source: Hofstaetter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation", 2020.
    """
    _check_candidates(student, teacher)
    counts = None if mask is None else mask[:, :1] & mask[:, 1:]
    margins = [
        (full_precision(scores[:, :1]) - full_precision(scores[:, 1:]))[..., None] for scores in (student, teacher)
    ]
    s, t = select(counts, *margins)
    return reduce((s - t).square().squeeze(-1), student[:, 1:].shape, counts, reduction)


def listwise_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KL divergence of the distributions that scores give over the candidates of a query.

    :math:`\tau^2 \mathrm{KL}(\mathrm{softmax}(t / \tau) \,\|\, \mathrm{softmax}(s / \tau))`, over the candidates that
    there are.

    Args:
        student: Scores ``[B, C]``.
        teacher: Likewise.
        temperature: Divides the scores, above 0.
        mask: Bool ``[B, C]``, the candidates there are; None where all are. A row counts where it has two or more.
        reduction: ``"mean"`` over rows, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or shape ``[B]`` with ``reduction="none"``.

    Raises:
        ValueError: If shapes differ, there is one candidate alone, or the temperature is not above 0.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> round(functional.listwise_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])).item(), 4)
        0.3278

    Source: Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", 2007 (top-one probabilities);
    between a reranker and a retriever as in Ren et al., "RocketQAv2", 2021.
    """
    _check_candidates(student, teacher)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"Expected argument `temperature` to be finite and above 0, but got {temperature}.")
    rows = None if mask is None else mask.sum(1) > 1
    s, t = (scores / temperature for scores in select(rows, student, teacher))
    absent = torch.zeros_like(s, dtype=torch.bool) if mask is None or rows is None else ~mask[rows]
    log_q, log_p = (x.masked_fill(absent, -torch.inf).log_softmax(-1) for x in (s, t))
    # What is not there is taken out before the product: 0 times infinity has no gradient.
    difference = log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)
    values = temperature**2 * (log_p.exp() * difference).sum(-1)
    return reduce(values, student.shape[:1], rows, reduction)


def cosent(scores: Tensor, labels: Tensor, *, scale: float = 20.0, mask: Tensor | None = None) -> Tensor:
    r"""How far the order of the cosines of pairs is from the order of their labels, one value of a whole batch.

    :math:`\log(1 + \sum_{y_i < y_j} e^{\lambda (c_i - c_j)})`, over all pairs of items whose labels differ.

    Args:
        scores: Cosines, of any shape.
        labels: Of that shape; only their order matters.
        scale: :math:`\lambda`, above 0.
        mask: Bool of that shape, the items that count; None where all do.

    Returns:
        A scalar, 0 where no labels differ.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> round(functional.cosent(torch.tensor([0.9, 0.9]), torch.tensor([0.0, 1.0])).item(), 4)
        0.6931

    Source: Huang et al., "CoSENT: Consistent Sentence Embedding via Similarity Ranking", 2024.
    """
    check_same_shape(scores, labels, "scores", "labels")
    (cosines,), (order,) = select(mask, scores[..., None]), select(mask, labels[..., None])
    differences = scale * (cosines - cosines.T)
    wrong = differences[order < order.T]
    return torch.cat([wrong.new_zeros(1), wrong]).logsumexp(0)


def _check_candidates(student: Tensor, teacher: Tensor) -> None:
    check_same_shape(student, teacher, "student", "teacher")
    if student.ndim != 2 or student.shape[1] < 2:
        raise ValueError(
            "Expected arguments `student` and `teacher` to be scores [queries, candidates] of two candidates or more, "
            f"but got {list(student.shape)}."
        )
