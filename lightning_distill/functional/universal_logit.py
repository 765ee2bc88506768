"""The distance between predictions over different vocabularies."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.functional.hard_label import IGNORE_INDEX
from lightning_distill.functional.reduction import Reduction, reduce, select


def universal_logit(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    words: Tensor | None = None,
    matched_weight: float = 1.0,
    unmatched_weight: float = 1.0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Universal logit distillation: the distance between two predictions whose classes have nothing in common.

    :math:`\sum_i |q_{(i)} - p_{(i)}|` of the probabilities sorted from the largest to the smallest, those of the
    smaller vocabulary followed by zeros. It is the Wasserstein distance with equal cost between any two words: in
    [0, 2], and 0 for predictions that are equally sure, whatever they are sure of. Beside it, a hard label says which
    words are meant.

    Words that both vocabularies are known to have are compared each with its own, :math:`\sum_w |q_w - p_w|`, and only
    the rest is sorted; the loss is the sum of both, each times its weight.

    Args:
        student_logits: Shape ``[..., C]``.
        teacher_logits: Shape ``[..., D]``.
        mask: Bool ``[...]``, the items that count; None where all do.
        words: Integer ``[M, 2]``, the student's and the teacher's number of each word that both have, each once, see
            :func:`matched_words`. None: nothing is matched.
        matched_weight: Factor of the matched words' distance, at least 0.
        unmatched_weight: Factor of the sorted distance of all others, at least 0.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If the items differ in number.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[-100.0, -100.0, 0.0, -100.0]])
        >>> functional.universal_logit(student, teacher).item()
        1.0
        >>> functional.universal_logit(student, teacher, words=torch.tensor([[0, 2]]), unmatched_weight=0.0).item()
        0.5

    Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    2024; matched words with a weight of their own as in Hugging Face's GOLD, 2025.
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            "Expected arguments `student_logits` and `teacher_logits` to have the same items, but got shapes "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}."
        )
    q, p = (torch.softmax(logits, -1) for logits in select(mask, student_logits, teacher_logits))
    values = _distance(q, p, words, matched_weight, unmatched_weight)
    return reduce(values, student_logits.shape[:-1], mask, reduction, num_items)


def merged_universal_logit(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor,
    teacher_labels: Tensor,
    student_spans: Tensor,
    teacher_spans: Tensor,
    *,
    words: Tensor | None = None,
    matched_weight: float = 1.0,
    unmatched_weight: float = 1.0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Universal logit distillation of two tokenizers, stretch by stretch of the text that both cut out.

    A model gives the stretch that is there the product of the probabilities of its pieces,
    :math:`Q = \prod_k q_k(\text{piece}_k)`, and what else could be there the prediction in front of its first piece,
    less :math:`Q` at that piece. The two together sum to 1, in however many pieces the stretch was cut. The loss of a
    stretch is

    - ``matched_weight`` times :math:`|Q - P|` plus :math:`\sum_w |q_w - p_w|` of the words that both have, and
    - ``unmatched_weight`` times the distance of all others, sorted, as in :func:`universal_logit`.

    Args:
        student_logits: Shape ``[B, T, C]``, each the prediction of the token in ``student_labels``.
        teacher_logits: Shape ``[B, U, D]``.
        student_labels: Integer ``[B, T]``, the tokens of the text; -100 for one that does not count.
        teacher_labels: Integer ``[B, U]``.
        student_spans: Integer ``[B, T]``, the number of each token's stretch in its row, -1 for none, see
            :func:`shared_spans`. A stretch counts if all its tokens do, the student's and the teacher's.
        teacher_spans: Integer ``[B, U]``.
        words: As in :func:`universal_logit`.
        matched_weight: Factor of what is compared directly, at least 0.
        unmatched_weight: Factor of the sorted distance, at least 0.
        reduction: ``"mean"`` over the stretches that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number.

    Returns:
        A scalar, or with ``reduction="none"`` shape ``[B, T]``: each stretch at its first token of the student's, 0
        elsewhere; float32, or float64 for float64 logits.

    Raises:
        ValueError: If labels and stretches do not have the shapes of the logits.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> # The student reads "ab" as one token of two, the teacher as "a" and "b": 1/2 and 1/3 * 1/3.
        >>> student, teacher = torch.zeros(1, 1, 2), torch.zeros(1, 2, 3)
        >>> tokens, spans = (torch.tensor([[1]]), torch.tensor([[0, 1]])), (torch.tensor([[0]]), torch.tensor([[0, 0]]))
        >>> loss = functional.merged_universal_logit(student, teacher, *tokens, *spans, unmatched_weight=0.0)
        >>> round(loss.item(), 4)
        0.3889

    Source: Boizard et al., 2024, as in :func:`universal_logit`; the chain rule over the pieces of a stretch as in
    Hugging Face's GOLD, 2025, which scales the rest of the prediction by the later pieces where this keeps its sum.
    """
    for name, tensor, logits in (
        ("student_labels", student_labels, student_logits),
        ("student_spans", student_spans, student_logits),
        ("teacher_labels", teacher_labels, teacher_logits),
        ("teacher_spans", teacher_spans, teacher_logits),
    ):
        if tensor.shape != logits.shape[:-1]:
            raise ValueError(
                f"Expected argument `{name}` to have shape {list(logits.shape[:-1])}, but got {list(tensor.shape)}."
            )
    pieces, of_teacher = counted_pieces(student_labels, teacher_labels, student_spans, teacher_spans)
    span_q, q = _merged(student_logits, student_labels, student_spans, pieces)
    span_p, p = _merged(teacher_logits, teacher_labels, teacher_spans, of_teacher)
    values = matched_weight * (span_q - span_p).abs() + _distance(q, p, words, matched_weight, unmatched_weight)
    return reduce(values, student_labels.shape, first_pieces(student_spans, pieces), reduction, num_items)


def matched_words(student: Mapping[str, int], teacher: Mapping[str, int]) -> Tensor:
    """The words that two vocabularies have in common.

    Args:
        student: The student's vocabulary, such as ``tokenizer.get_vocab()``.
        teacher: The teacher's.

    Returns:
        Integer ``[M, 2]``, the number of each word in both, in the student's order.

    Example:
        >>> from lightning_distill import functional
        >>> functional.matched_words({"a": 0, "b": 1, "ab": 2}, {"b": 0, "a": 1}).tolist()
        [[0, 1], [1, 0]]
    """
    both = sorted((number, teacher[word]) for word, number in student.items() if word in teacher)
    return torch.tensor(both, dtype=torch.long).reshape(-1, 2)


def counted_pieces(
    student_labels: Tensor, teacher_labels: Tensor, student_spans: Tensor, teacher_spans: Tensor
) -> tuple[Tensor, Tensor]:
    """Bool ``[B, T]`` and ``[B, U]``: the tokens of those stretches all of whose tokens count, in both."""
    most = (
        int(max(student_spans.max(), teacher_spans.max())) + 1 if student_spans.numel() * teacher_spans.numel() else 0
    )
    whole = torch.ones(len(student_spans), most + 1, dtype=torch.bool, device=student_spans.device)
    for labels, spans in ((student_labels, student_spans), (teacher_labels, teacher_spans)):
        # The last column is that of no stretch.
        tokens = torch.zeros(whole.shape, dtype=torch.long, device=whole.device)
        kept = tokens.scatter_add(1, spans % (most + 1), (labels != IGNORE_INDEX).long())
        whole &= (tokens.scatter_add(1, spans % (most + 1), torch.ones_like(spans)) == kept) & (kept > 0)
    whole[:, -1] = False
    return whole.gather(1, student_spans % (most + 1)), whole.gather(1, teacher_spans % (most + 1))


def first_pieces(spans: Tensor, pieces: Tensor) -> Tensor:
    """Bool ``[B, T]``: of tokens that are pieces of stretches, the first of each."""
    before = F.pad(spans.masked_fill(~pieces, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    return pieces & (spans > before)


def _merged(logits: Tensor, labels: Tensor, spans: Tensor, pieces: Tensor) -> tuple[Tensor, Tensor]:
    """Probability ``[G]`` of each stretch, and ``[G, C]`` of what else could be in its place."""
    log_q, tokens = torch.log_softmax(select(pieces, logits)[0], -1), labels[pieces][:, None]
    first = first_pieces(spans, pieces)[pieces]
    of_pieces = log_q.gather(1, tokens)[:, 0]
    stretch = of_pieces.new_zeros(int(first.sum())).index_add(0, first.cumsum(0) - 1, of_pieces).exp()
    return stretch, log_q[first].exp().scatter_add(1, tokens[first], -stretch[:, None])


def _distance(q: Tensor, p: Tensor, words: Tensor | None, matched_weight: float, unmatched_weight: float) -> Tensor:
    """Of probabilities ``[N, C]`` and ``[N, D]``, the matched words' distance and the others', weighed."""
    matched = q.new_zeros(())
    if words is not None:
        of_student, of_teacher = words.to(q.device).unbind(-1)
        matched = (q[:, of_student] - p[:, of_teacher]).abs().sum(-1)
        # As zeros they are sorted to the end, where each vocabulary is filled up with zeros anyway.
        q, p = q.index_fill(-1, of_student, 0.0), p.index_fill(-1, of_teacher, 0.0)
    q, p = (x.sort(-1, descending=True).values for x in (q, p))
    most = max(q.shape[-1], p.shape[-1])
    q, p = (F.pad(x, (0, most - x.shape[-1])) for x in (q, p))
    return matched_weight * matched + unmatched_weight * (q - p).abs().sum(-1)
