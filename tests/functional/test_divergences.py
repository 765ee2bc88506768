"""Each divergence's own gradient against autograd through its value."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from lightning_distill import functional
from lightning_distill.functional.chunked import chunked_losses
from lightning_distill.functional.divergences import Divergence
from lightning_distill.functional.projection import Projection, TopK
from lightning_distill.functional.terms import Chunk, CosineTerm, HardLabelTerm, SoftTargetTerm, StandardizedTerm, Term

LOGITS, TEACHER = (
    3 * torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
)
LABELS = torch.arange(5) % 4
BEST = {2.0: TopK(*(TEACHER / 2.0).log_softmax(-1).topk(3))}


def assert_is_that_of_autograd(term: Term, teacher: Tensor | dict[float, TopK]) -> None:
    logits = LOGITS.clone().requires_grad_()
    values, gradient = term(Chunk(logits, teacher, LABELS))
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (expected,) = torch.autograd.grad((weights * values).sum(), logits, retain_graph=True)
    torch.testing.assert_close(weights[:, None] * gradient(), expected)
    torch.testing.assert_close(weights[:, None] * gradient(), expected)  # asked twice


@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_divergences(divergence: Divergence, share: float) -> None:
    assert_is_that_of_autograd(SoftTargetTerm(2.0, divergence, beta=share, alpha=0.2), TEACHER)


@pytest.mark.parametrize("term", [SoftTargetTerm(2.0), HardLabelTerm(), HardLabelTerm(0.1)], ids=repr)
def test_the_best_words_and_labels(term: Term) -> None:
    assert_is_that_of_autograd(term, BEST)


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_of_z_scores(divergence: Divergence) -> None:
    assert_is_that_of_autograd(StandardizedTerm(SoftTargetTerm(2.0, divergence)), TEACHER)


def test_cosine() -> None:
    assert_is_that_of_autograd(CosineTerm(), TEACHER)


def test_of_the_best_words_there_is_the_forward_kl_alone() -> None:
    with pytest.raises(ValueError, match=r"`divergence` to be 'forward_kl' .* but got 'js'"):
        SoftTargetTerm(2.0, "js")(Chunk(LOGITS, BEST))
    with pytest.raises(ValueError, match="`standardize` to be False with a teacher's k best words"):
        StandardizedTerm(SoftTargetTerm(2.0))(Chunk(LOGITS, BEST))


@pytest.mark.parametrize("beta", [0.0, 1e-4])
def test_alpha_beta_tends_to_both_kl(beta: float) -> None:
    student, teacher = LOGITS, TEACHER
    near = 1 - 1e-4
    forward = functional.soft_target(student, teacher, divergence="alpha_beta", alpha=near, beta=beta)
    torch.testing.assert_close(forward, functional.soft_target(student, teacher), rtol=2e-3, atol=0)
    backward = functional.soft_target(student, teacher, divergence="alpha_beta", alpha=1e-4, beta=near)
    expected = functional.soft_target(student, teacher, divergence="reverse_kl")
    torch.testing.assert_close(backward, expected, rtol=2e-3, atol=0)


def test_shares_are_those_of_the_papers_where_none_is_given() -> None:
    for divergence, shares in (
        ("js", {"beta": 0.5}),
        ("skew_forward_kl", {"alpha": 0.1}),
        ("skew_reverse_kl", {"alpha": 0.1}),
        ("alpha_beta", {"alpha": 0.2, "beta": 0.7}),
        ("adaptive_kl", {"alpha": 0.5}),
    ):
        ours = functional.soft_target(LOGITS, TEACHER, divergence=divergence)
        assert ours == functional.soft_target(LOGITS, TEACHER, divergence=divergence, **shares)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_any_number_of_terms_in_one_pass(softcap: float | None) -> None:
    hidden, weight = LOGITS[:, :3].clone().requires_grad_(), TEACHER[:, :3].repeat(2, 1).clone().requires_grad_()
    teacher, mask = TEACHER.repeat(1, 2)[:, :10], torch.arange(5) != 2

    def squares(chunk: Chunk) -> tuple[Tensor, object]:
        return chunk.logits.square().sum(1), lambda: 2 * chunk.logits

    terms = [(0.5, SoftTargetTerm(1.0)), (0.2, SoftTargetTerm(3.0, "js")), (0.1, squares), (0.3, CosineTerm())]
    student = Projection(hidden, weight, softcap=softcap, scale=0.7)
    ours = chunked_losses(student, terms, teacher, mask=mask, chunk_size=2)  # type: ignore[arg-type]
    logits = student.logits()[mask]
    theirs = torch.stack(
        [
            functional.soft_target(logits, teacher[mask], reduction="sum"),
            functional.soft_target(logits, teacher[mask], temperature=3.0, divergence="js", reduction="sum"),
            logits.square().sum(),
            functional.logits_cosine(logits, teacher[mask], reduction="sum"),
        ]
    )
    torch.testing.assert_close(ours, theirs)
    # As announced, and then another total.
    for weights in ([0.5, 0.2, 0.1, 0.3], [1.0, 0.0, 3.0, 0.5]):
        totals = [losses @ torch.tensor(weights, dtype=torch.float64) for losses in (ours, theirs)]
        one, other = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for total in totals)
        torch.testing.assert_close(one, other)
