"""Divergences between the predictions of student and teacher."""

from torch import Tensor

from lightning_distill.functional.divergences import (
    Divergence,
    check_divergence,
    check_temperature,
    divergence_of,
    log_probabilities,
)
from lightning_distill.functional.reduction import Reduction, check_same_shape, reduce, select
from lightning_distill.functional.standardize import standardize as z_scores


def soft_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float | None = None,
    alpha: float | None = None,
    standardize: bool = False,
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
    - ``"total_variation"``: :math:`\frac{1}{2} \sum_c |p_c - q_c|`;
    - ``"alpha_beta"``: :math:`\frac{1}{\alpha \beta} \sum_c \left(\frac{\alpha}{\alpha + \beta} p_c^{\alpha + \beta}
      + \frac{\beta}{\alpha + \beta} q_c^{\alpha + \beta} - p_c^\alpha q_c^\beta\right)`, and its limit where
      :math:`\beta` is 0. With :math:`\alpha + \beta = 1` it goes from the reverse KL (:math:`\alpha \to 0`) to the
      forward one;
    - ``"adaptive_kl"``: :math:`w \mathrm{KL}(p \| q) + (1 - w) \mathrm{KL}(q \| p)`, where :math:`w` is the share of
      :math:`\sum_c |p_c - q_c|` in the head: the fewest classes that have :math:`\alpha` of the teacher's mass. No
      gradient goes through :math:`w`.

    The factor :math:`\tau^2` keeps the size of the gradient when the temperature changes. Sums run over classes and
    the mean over rows (or tokens) only, so the loss is in nats per item.

    Args:
        student_logits: Shape ``[..., C]``, of at least 2 classes.
        teacher_logits: Likewise.
        temperature: Divides both logits, above 0.
        divergence: The name of :math:`D`.
        beta: In [0, 1]: weight of the teacher in the mixture of ``"js"`` (0.5 where None); the student's exponent of
            ``"alpha_beta"`` (0.7).
        alpha: In (0, 1): share that the skewed divergences mix in (0.1 where None, as DistiLLM has it); the teacher's
            exponent of ``"alpha_beta"`` (0.2); the head's mass of ``"adaptive_kl"`` (0.5).
        standardize: Whether z-scores of the logits take their place (:func:`standardize`); of at least 3 classes.
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
    2023 (total variation); Wang et al., "ABKD", 2025 (alpha-beta); Wu et al., "Rethinking Kullback-Leibler Divergence
    in Knowledge Distillation for Large Language Models", 2024 (adaptive; the authors' code leaves the class that
    completes the head out of it).
    """
    check_divergence(divergence, beta, alpha)
    check_classes(student_logits, teacher_logits, temperature)
    student, teacher = (
        log_probabilities(z_scores(logits) if standardize else logits, temperature)
        for logits in select(mask, student_logits, teacher_logits)
    )
    values, _ = divergence_of(student, teacher, divergence, beta, alpha)
    return reduce(temperature**2 * values, student_logits.shape[:-1], mask, reduction, num_items)


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
