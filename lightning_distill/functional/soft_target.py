"""Divergences between the predictions of student and teacher."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distill.functional.reduction import Reduction, check_same_shape, reduce, select

Divergence = Literal[
    "forward_kl", "reverse_kl", "jeffreys", "js", "skew_forward_kl", "skew_reverse_kl", "total_variation"
]

# Stands for log 0. Infinite log-probabilities would give 0 * inf = NaN where both models exclude a class; with this
# number such a class adds exactly 0, and one that only one of them excludes adds a finite amount.
LOG_ZERO = -1e30


def soft_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Divergence of the student's softened prediction from the teacher's, times the squared temperature.

    With :math:`p = \mathrm{softmax}(z_t / \tau)` of the teacher and :math:`q = \mathrm{softmax}(z_s / \tau)` of the
    student, a row or token has :math:`\tau^2 D(p, q)`, where :math:`D` is

    - ``"forward_kl"``: :math:`\mathrm{KL}(p \| q) = \sum_c p_c (\log p_c - \log q_c)`;
    - ``"reverse_kl"``: :math:`\mathrm{KL}(q \| p)`;
    - ``"jeffreys"``: :math:`\frac{1}{2} (\mathrm{KL}(p \| q) + \mathrm{KL}(q \| p))`, a symmetric KL;
    - ``"js"``: :math:`\beta \mathrm{KL}(p \| m) + (1 - \beta) \mathrm{KL}(q \| m)` with
      :math:`m = \beta p + (1 - \beta) q`. It vanishes with :math:`\beta` and with :math:`1 - \beta`; divided by them
      it tends to :math:`\mathrm{KL}(p \| q)` and to :math:`\mathrm{KL}(q \| p)`, and that is what 0 and 1 stand for
      here, as in GKD and TRL: the direction of the gradient is continuous there, its length is not;
    - ``"skew_forward_kl"``: :math:`\mathrm{KL}(p \| \alpha p + (1 - \alpha) q)`;
    - ``"skew_reverse_kl"``: :math:`\mathrm{KL}(q \| \alpha q + (1 - \alpha) p)`;
    - ``"total_variation"``: :math:`\frac{1}{2} \sum_c |p_c - q_c|`.

    The factor :math:`\tau^2` keeps the size of the gradient when the temperature changes. Sums run over classes and
    the mean over rows (or tokens) only, so the loss is in nats per item.

    Args:
        student_logits: Shape ``[..., C]``, of at least 2 classes.
        teacher_logits: Likewise.
        temperature: Divides both logits, above 0.
        divergence: The name of :math:`D`.
        beta: Weight of the teacher in the mixture of ``"js"``, in [0, 1].
        alpha: Share that the skewed divergences mix in, in (0, 1).
        mask: Bool ``[...]``, the items that count; None where all do.
        reduction: ``"mean"`` over the items that count, ``"sum"``, or ``"none"``.
        num_items: What ``"mean"`` divides by in place of their number, such as that of a whole accumulated batch.

    Returns:
        A scalar, or shape ``[...]`` with ``reduction="none"``; float32, or float64 for float64 logits.

    Raises:
        ValueError: If shapes differ, there is one class only, or an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> round(functional.soft_target(student, teacher, temperature=2.0).item(), 4)
        0.4438
        >>> round(functional.soft_target(student, teacher, divergence="js").item(), 4)
        0.0895

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015; Gu et al., "MiniLLM", 2024
    (reverse KL); Agarwal et al., "On-Policy Distillation of Language Models", 2024 (generalised Jensen-Shannon); Ko et
    al., "DistiLLM", 2024 (skew); Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
    2023 (total variation).
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"Expected argument `divergence` to be one of {get_args(Divergence)}, but got {divergence!r}.")
    check_shares(beta, alpha)
    check_classes(student_logits, teacher_logits, temperature)
    student, teacher = (
        log_probabilities(logits, temperature) for logits in select(mask, student_logits, teacher_logits)
    )
    formula, share = beside_limits(divergence, beta if divergence == "js" else alpha)
    values = temperature**2 * DIVERGENCES[formula](student, teacher, share)
    return reduce(values, student_logits.shape[:-1], mask, reduction, num_items)


def check_shares(beta: float, alpha: float) -> None:
    """Refuse a ``beta`` outside [0, 1] and an ``alpha`` outside (0, 1)."""
    if not 0 <= beta <= 1:
        raise ValueError(f"Expected argument `beta` to be in [0, 1], but got {beta}.")
    if not 0 < alpha < 1:
        raise ValueError(f"Expected argument `alpha` to be in (0, 1), but got {alpha}.")


def beside_limits(divergence: str, share: float) -> tuple[str, float]:
    """The divergence and its share, with the names of the limits in the place of ``"js"`` with a share of 0 or 1."""
    limits = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return (limits.get(float(share), "js") if divergence == "js" else divergence), share


def check_classes(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    """Refuse logits of different shapes or of a single class, and a temperature that is no temperature.

    Args:
        student_logits: Shape ``[..., C]``.
        teacher_logits: Likewise.
        temperature: Finite and above 0.

    Raises:
        ValueError: If so.
    """
    check_same_shape(student_logits, teacher_logits, "student_logits", "teacher_logits")
    if student_logits.shape[-1] < 2:
        raise ValueError(
            "Expected argument `student_logits` to have at least 2 classes, but got 1: a softmax over one class is "
            "always 1, and the loss 0. Use `functional.logits_mse`."
        )
    check_temperature(temperature)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not finite and above 0."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"Expected argument `temperature` to be finite and above 0, but got {temperature}.")


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Log of the softened prediction, with a large negative number for log 0.

    Args:
        logits: Shape ``[N, C]``, float32 or float64.
        temperature: Divides the logits.

    Returns:
        Shape ``[N, C]``.
    """
    return torch.log_softmax(logits / temperature, dim=-1).clamp(min=LOG_ZERO)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence :math:`\mathrm{KL}(p \| q)` over the last dimension.

    Args:
        log_p: Shape ``[..., C]``, no less than ``LOG_ZERO``.
        log_q: Likewise.

    Returns:
        Shape ``[...]``.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Log of the mixture that has a share of p and the rest of q.

    Args:
        log_p: Shape ``[..., C]``.
        log_q: Likewise.
        share: In (0, 1).

    Returns:
        Shape ``[..., C]``.
    """
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _js(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    middle = mixture(teacher, student, beta)
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


#: By name, of the log-probabilities of student and teacher and the share that is mixed in; shape ``[N]``.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda student, teacher, _: kl(teacher, student),
    "reverse_kl": lambda student, teacher, _: kl(student, teacher),
    "jeffreys": lambda student, teacher, _: 0.5 * (kl(teacher, student) + kl(student, teacher)),
    "js": _js,
    "skew_forward_kl": lambda student, teacher, alpha: kl(teacher, mixture(teacher, student, alpha)),
    "skew_reverse_kl": lambda student, teacher, alpha: kl(student, mixture(student, teacher, alpha)),
    "total_variation": lambda student, teacher, _: 0.5 * (teacher.exp() - student.exp()).abs().sum(-1),
}
