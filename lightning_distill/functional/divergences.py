"""Each divergence once: its value, and its gradient at the student's prediction.

Every function here returns the value of each item and a function of no argument that computes the gradient. Losses on
whole logits take the value, which autograd goes through; the chunked ones (:mod:`lightning_distill.functional.terms`)
take both, and so need no graph.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "js",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "alpha_beta",
    "adaptive_kl",
]

# The shares of the papers, for a divergence that has one and is given none.
_BETA = {"js": 0.5, "alpha_beta": 0.7}
_ALPHA = {"skew_forward_kl": 0.1, "skew_reverse_kl": 0.1, "alpha_beta": 0.2, "adaptive_kl": 0.5}

#: Values ``[...]`` of items, and what computes the gradient ``[..., C]`` of each item's value.
WithGradient: TypeAlias = tuple[Tensor, Callable[[], Tensor]]

# Stands for log 0. Infinite log-probabilities would give 0 * inf = NaN where both models exclude a class; with this
# number such a class adds exactly 0, and one that only one of them excludes adds a finite amount.
LOG_ZERO = -1e30


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not finite and above 0."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"Expected argument `temperature` to be finite and above 0, but got {temperature}.")


def check_divergence(divergence: str, beta: float | None, alpha: float | None) -> None:
    """Refuse a divergence that is not known, a ``beta`` outside [0, 1] and an ``alpha`` outside (0, 1)."""
    if divergence not in get_args(Divergence):
        raise ValueError(f"Expected argument `divergence` to be one of {get_args(Divergence)}, but got {divergence!r}.")
    if beta is not None and not 0 <= beta <= 1:
        raise ValueError(f"Expected argument `beta` to be in [0, 1], but got {beta}.")
    if alpha is not None and not 0 < alpha < 1:
        raise ValueError(f"Expected argument `alpha` to be in (0, 1), but got {alpha}.")


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


def divergence_of(
    log_q: Tensor, log_p: Tensor, divergence: str, beta: float | None, alpha: float | None
) -> WithGradient:
    """A divergence by its name, see :func:`lightning_distill.functional.soft_target`.

    Args:
        log_q: The student's log-probabilities ``[..., C]``, no less than ``LOG_ZERO``.
        log_p: The teacher's, likewise.
        divergence: Its name.
        beta: Share of ``"js"``, for which 0 and 1 stand for the divergences that it tends to, or the student's exponent
            of ``"alpha_beta"``; None: as published.
        alpha: Share of the skewed ones, the teacher's exponent of ``"alpha_beta"``, or the head's mass of
            ``"adaptive_kl"``; None: as published.

    Returns:
        Values, and the gradient at ``log_q``, up to a multiple of the student's probabilities in each item:
        :func:`at_logits` takes that away.
    """
    beta = _BETA.get(divergence, 0.0) if beta is None else float(beta)
    alpha = _ALPHA.get(divergence, 0.0) if alpha is None else float(alpha)
    if divergence == "alpha_beta":
        return _alpha_beta(log_q, log_p, alpha, beta)
    if divergence == "js":
        divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "js")
    return _BY_NAME[divergence](log_q, log_p, beta if divergence == "js" else alpha)


def at_logits(gradient: Tensor, log_q: Tensor) -> Tensor:
    r"""The gradient at the softened logits, of one at the log-probabilities: :math:`g_c - q_c \sum_k g_k`.

    Args:
        gradient: Shape ``[..., C]``.
        log_q: The student's log-probabilities, likewise.

    Returns:
        Shape ``[..., C]``.
    """
    return torch.addcmul(gradient, log_q.exp(), gradient.sum(-1, keepdim=True), value=-1.0)


def top_k_kl(log_q: Tensor, log_p: Tensor, classes: Tensor) -> WithGradient:
    """Forward KL on k classes and one more for all others, see :func:`lightning_distill.functional.top_k_soft_target`.

    Args:
        log_q: The student's log-probabilities ``[N, C]``.
        log_p: The teacher's of its best classes ``[N, k]``.
        classes: Integer ``[N, k]``, each class once.

    Returns:
        Values, and the gradient at ``log_q``.
    """
    # Where all classes are there is no tail, whatever rounding leaves of it.
    of_best = log_p.exp().sum(-1, keepdim=True).clamp(max=1)
    of_best = of_best if classes.shape[-1] < log_q.shape[-1] else torch.ones_like(of_best)
    tail = torch.log1p(-of_best).clamp(min=LOG_ZERO)
    student_tail = log_q.scatter(-1, classes, LOG_ZERO).logsumexp(-1, keepdim=True)
    log_p = log_p.clamp(min=LOG_ZERO)
    values = kl(torch.cat([log_p, tail], -1), torch.cat([log_q.gather(-1, classes), student_tail], -1))
    # The teacher's tail is shared out as the student shares out its own.
    return values, lambda: (log_q + (tail - student_tail)).exp().scatter(-1, classes, log_p.exp()).neg()


def cosine_distance(student: Tensor, teacher: Tensor) -> WithGradient:
    """One minus the cosine over the last dimension.

    Args:
        student: Shape ``[..., D]``.
        teacher: Likewise.

    Returns:
        Values, and the gradient at ``student``.
    """
    # As torch does: a norm of 0 has no direction.
    size, of_teacher = (x.norm(dim=-1, keepdim=True).clamp(min=1e-8) for x in (student, teacher))
    direction, wanted = student / size, teacher / of_teacher
    cosine = (direction * wanted).sum(-1)  # a `vecdot` would be computed in the type of autocast
    return 1 - cosine, lambda: (direction * cosine[..., None] - wanted) / size


def _forward_kl(log_q: Tensor, log_p: Tensor, _: float) -> WithGradient:
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), lambda: -p


def _reverse_kl(log_q: Tensor, log_p: Tensor, _: float) -> WithGradient:
    weighted = log_q.exp() * (log_q - log_p)
    return weighted.sum(-1), lambda: weighted


def _jeffreys(log_q: Tensor, log_p: Tensor, share: float) -> WithGradient:
    (forward, down), (reverse, up) = _forward_kl(log_q, log_p, share), _reverse_kl(log_q, log_p, share)
    return 0.5 * (forward + reverse), lambda: 0.5 * (down() + up())


def _js(log_q: Tensor, log_p: Tensor, beta: float) -> WithGradient:
    log_m = _mixture(log_p, log_q, beta)
    of_student, weighted = _reverse_kl(log_q, log_m, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * of_student, lambda: (1 - beta) * weighted()


def _skew_forward_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> WithGradient:
    log_m = _mixture(log_p, log_q, alpha)
    return kl(log_p, log_m), lambda: (alpha - 1) * (log_p + log_q - log_m).exp()


def _skew_reverse_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> WithGradient:
    log_m = _mixture(log_q, log_p, alpha)
    values, weighted = _reverse_kl(log_q, log_m, alpha)
    return values, lambda: weighted() - alpha * (2 * log_q - log_m).exp()


def _total_variation(log_q: Tensor, log_p: Tensor, _: float) -> WithGradient:
    q, p = log_q.exp(), log_p.exp()
    return 0.5 * (p - q).abs().sum(-1), lambda: 0.5 * q * (q - p).sign()


def _alpha_beta(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> WithGradient:
    both = alpha + beta
    larger, gap = torch.maximum(log_q, log_p), (log_q - log_p).abs()
    if beta:
        # Powers of the larger probability, times what is 0 where both are the same: nothing large is subtracted.
        smaller = torch.where(log_q > log_p, gap.new_tensor(alpha), beta)
        shape = smaller / both * torch.expm1(-both * gap) - torch.expm1(-smaller * gap)
        values = ((both * larger).exp() * shape).sum(-1) / (alpha * beta)
    else:
        q, p = (alpha * log_q).exp(), (alpha * log_p).exp()
        values = (q - p + alpha * p * (log_p - log_q)).sum(-1) / alpha**2
    return values, lambda: (beta * log_q).exp() * ((alpha * log_q).exp() - (alpha * log_p).exp()) / alpha


def _adaptive_kl(log_q: Tensor, log_p: Tensor, head: float) -> WithGradient:
    (forward, down), (reverse, up) = _forward_kl(log_q, log_p, head), _reverse_kl(log_q, log_p, head)
    with torch.no_grad():  # the weights are constants to the gradient, as in the authors' code
        p = log_p.exp()
        gap = (p - log_q.exp()).abs()
        p, classes = p.sort(dim=-1, descending=True, stable=True)
        in_head = p.cumsum(-1) - p < head
        of_head = (gap.gather(-1, classes) * in_head).sum(-1) / gap.sum(-1).clamp(min=torch.finfo(gap.dtype).tiny)
        share = of_head[..., None]
    values = of_head * forward + (1 - of_head) * reverse
    return values, lambda: share * down() + (1 - share) * up()


_BY_NAME: dict[str, Callable[[Tensor, Tensor, float], WithGradient]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jeffreys": _jeffreys,
    "js": _js,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "adaptive_kl": _adaptive_kl,
}


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Log of the mixture that has a share of p and the rest of q."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
