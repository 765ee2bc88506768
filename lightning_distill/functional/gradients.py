"""Losses of a block of tokens together with their slopes at the student's logits, written out by hand."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.functional.projection import TopK
from lightning_distill.functional.reduction import full_precision
from lightning_distill.functional.soft_target import LOG_ZERO, log_probabilities, mixture


@dataclass(frozen=True)
class Options:
    """How the losses of a block are computed, see :func:`linear_soft_target`; scale and cap are the student's."""

    temperature: float
    divergence: str
    share: float
    label_smoothing: float
    scale: float
    softcap: float | None


def block_losses(
    raw: Tensor,
    teacher: Tensor | TopK | None,
    labels: Tensor | None,
    options: Options,
    weights: tuple[float, float],
    with_slope: bool,
) -> tuple[Tensor, Tensor]:
    """Sums of both losses over a block of tokens, and the slope of their weighted total at the student's raw logits.

    Args:
        raw: Shape ``[N, V]``, float32 or float64, before scale and cap.
        teacher: Its logits ``[N, V]``, its k best words, or None for no soft target.
        labels: Shape ``[N]``, or None for no hard label.
        options: How.
        weights: Of soft target and hard label in the total.
        with_slope: Whether the slope is wanted.

    Returns:
        Shape ``[2]``, and ``[N, V]`` (of no meaning where it is not wanted).
    """
    scale, softcap, temperature = options.scale, options.softcap, options.temperature
    logits = raw if scale == 1.0 else raw * scale
    capped = None if softcap is None else torch.tanh(logits / softcap)
    logits = logits if capped is None or softcap is None else softcap * capped
    values, slopes = [raw.new_zeros(()), raw.new_zeros(())], []
    # The cosine alone asks for no probabilities.
    log_q = raw if options.divergence == "cosine" and labels is None else log_probabilities(logits, temperature)
    if teacher is not None:
        if options.divergence == "cosine":
            assert isinstance(teacher, Tensor)
            soft, slope = _cosine(logits, teacher)
        else:
            soft, slope = _soft(log_q, teacher, options, with_slope)
        values[0] = temperature**2 * soft.sum()
        if with_slope:
            slopes.append(slope.mul_(weights[0] * temperature))
    if labels is not None:
        log_q = log_q if temperature == 1.0 else log_probabilities(logits, 1.0)
        hard, slope = _hard(log_q, labels, options.label_smoothing, with_slope)
        values[1] = hard.sum()
        if with_slope:
            slopes.append(slope.mul_(weights[1]))
    if not slopes:
        return torch.stack(values), raw
    slope = slopes[0] if len(slopes) == 1 else slopes[0].add_(slopes[1])
    if capped is not None:
        slope = slope * (1 - capped * capped)
    return torch.stack(values), slope if scale == 1.0 else slope * scale


def _hard(log_q: Tensor, labels: Tensor, smoothing: float, with_slope: bool) -> tuple[Tensor, Tensor]:
    """Cross entropy per token, and its slope at the logits."""
    values = -(1 - smoothing) * log_q.gather(1, labels[:, None])[:, 0]
    if smoothing:
        values = values - smoothing * log_q.mean(1)
    if not with_slope:
        return values, log_q
    slope = log_q.exp()
    slope = slope.sub_(smoothing / slope.shape[1]) if smoothing else slope
    return values, slope.scatter_add_(1, labels[:, None], slope.new_full((len(labels), 1), smoothing - 1))


def _cosine(logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """One minus the cosine per token, and its slope at the logits."""
    # As torch does: a norm of 0 has no direction.
    size, of_teacher = (x.norm(dim=1, keepdim=True).clamp(min=1e-8) for x in (logits, teacher))
    direction, wanted = logits / size, teacher / of_teacher
    cosine = torch.linalg.vecdot(direction, wanted)
    return 1 - cosine, direction.mul_(cosine[:, None]).sub_(wanted).div_(size)


def _soft(log_q: Tensor, teacher: Tensor | TopK, options: Options, with_slope: bool) -> tuple[Tensor, Tensor]:
    """Divergence per token without its squared temperature, and its slope at the softened logits."""
    if isinstance(teacher, TopK):
        return _top_k(log_q, teacher, with_slope)
    log_p = log_probabilities(teacher, options.temperature)
    values, weighted = _SLOPES[options.divergence](log_q, log_p, options.share)
    if not with_slope:
        return values, weighted
    # Down through the softmax: q_c (g_c - sum_k q_k g_k) for the slope g of the divergence at q.
    return values, weighted.addcmul_(log_q.exp(), weighted.sum(1, keepdim=True), value=-1.0)


def _top_k(log_q: Tensor, teacher: TopK, with_slope: bool) -> tuple[Tensor, Tensor]:
    log_p, classes = full_precision(teacher.log_probs).clamp(min=LOG_ZERO), teacher.classes.long()
    p = log_p.exp()
    # Where all classes are there is no tail, whatever rounding leaves of it.
    of_best = p.sum(1, keepdim=True).clamp(max=1) if classes.shape[1] < log_q.shape[1] else torch.ones_like(p[:, :1])
    tail, log_tail = 1 - of_best, torch.log1p(-of_best).clamp(min=LOG_ZERO)
    log_student_tail = log_q.scatter(1, classes, LOG_ZERO).logsumexp(1, keepdim=True)
    values = (p * (log_p - log_q.gather(1, classes))).sum(1) + (tail * (log_tail - log_student_tail))[:, 0]
    if not with_slope:
        return values, log_q
    # The teacher's tail is shared out as the student shares out its own.
    shares = (log_q + (log_tail - log_student_tail)).exp_().scatter_(1, classes, p)
    return values, log_q.exp().sub_(shares)


def _forward_kl(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    values = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return values, p.neg_()


def _reverse_kl(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    weighted = log_q.exp() * (log_q - log_p)
    return weighted.sum(1), weighted


def _jeffreys(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    p, weighted = log_p.exp(), log_q.exp() * (log_q - log_p)
    values = 0.5 * (weighted.sum(1) + (p * (log_p - log_q)).sum(1))
    return values, 0.5 * (weighted - p)


def _js(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m = mixture(log_p, log_q, beta)
    weighted = log_q.exp() * (log_q - log_m) * (1 - beta)
    return beta * (log_p.exp() * (log_p - log_m)).sum(1) + weighted.sum(1), weighted


def _skew_forward_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    log_m = mixture(log_p, log_q, alpha)
    values = (log_p.exp() * (log_p - log_m)).sum(1)
    return values, (log_p + log_q - log_m).exp() * (alpha - 1)


def _skew_reverse_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    log_m = mixture(log_q, log_p, alpha)
    q = log_q.exp()
    weighted = q * (log_q - log_m)
    return weighted.sum(1), weighted + q - alpha * (2 * log_q - log_m).exp()


def _total_variation(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    difference = q - log_p.exp()
    return 0.5 * difference.abs().sum(1), 0.5 * q * difference.sign()


#: Per divergence: its value, and the student's probability times the divergence's slope at it.
_SLOPES: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jeffreys": _jeffreys,
    "js": _js,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
}
