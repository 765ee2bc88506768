"""linear_cosine against torch's cosine on whole logits, by autograd."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import functional
from lightning_distill.functional.chunked import chunked_losses
from lightning_distill.functional.projection import Projection
from lightning_distill.functional.terms import CosineTerm, HardLabelTerm

MASK = torch.arange(12) % 4 != 0


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(words: int = 11, teacher_words: int = 11) -> dict[str, Tensor]:
    student = [normal(12, 3, seed=0), normal(words, 3, seed=1), normal(words, seed=2)]
    teacher = [normal(12, 4, seed=3), normal(teacher_words, 4, seed=4), normal(teacher_words, seed=5)]
    names = ("hidden", "weight", "bias")
    return {f"student_{name}": one.requires_grad_() for name, one in zip(names, student, strict=True)} | {
        f"teacher_{name}": one for name, one in zip(names, teacher, strict=True)
    }


def whole(given: dict[str, Tensor], cap: float | None = None) -> Tensor:
    """One minus torch's cosine per token."""
    student, teacher = (
        F.linear(*(given[f"{role}_{name}"] for name in ("hidden", "weight", "bias"))) for role in ("student", "teacher")
    )
    words = min(student.shape[-1], teacher.shape[-1])
    student = student if cap is None else cap * torch.tanh(student / cap)
    return 1 - F.cosine_similarity(student[:, :words], teacher[:, :words])


def assert_same(ours: Tensor, theirs: Tensor, given: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs)
    wanted = [one for one in given.values() if one.requires_grad]
    torch.testing.assert_close(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted))


@pytest.mark.parametrize("chunk_size", [1, 5, "auto"])
@pytest.mark.parametrize("words", [(11, 11), (11, 14), (14, 11)])
def test_is_torchs_cosine_of_whole_logits(chunk_size: Any, words: tuple[int, int]) -> None:
    given = inputs(*words)
    ours = functional.linear_cosine(**given, mask=MASK, chunk_size=chunk_size)
    assert_same(ours, whole(given)[MASK].mean(), given)
    assert_same(functional.linear_cosine(**given, reduction="sum", chunk_size=chunk_size), whole(given).sum(), given)
    assert_same(functional.linear_cosine(**given, student_softcap=2.0), whole(given, 2.0).mean(), given)
    assert_same(functional.linear_cosine(**given, num_items=30), whole(given).sum() / 30, given)


def test_gradcheck() -> None:
    given = inputs()
    names = [name for name, one in given.items() if one.requires_grad]

    def loss(*student: Tensor) -> Tensor:
        return functional.linear_cosine(**{**given, **dict(zip(names, student, strict=True))}, mask=MASK, chunk_size=5)

    # A second backward computes the gradient anew, with the factor inside and not after it.
    assert torch.autograd.gradcheck(loss, [given[name] for name in names], nondet_tol=1e-12)


def test_a_token_that_does_not_count_may_hold_anything() -> None:
    given = inputs()
    expected = functional.linear_cosine(**given, mask=MASK)
    with torch.no_grad():
        given["student_hidden"][~MASK] = torch.nan
        given["teacher_hidden"][~MASK] = torch.inf
    ours = functional.linear_cosine(**given, mask=MASK)
    torch.testing.assert_close(ours, expected)
    assert torch.autograd.grad(ours, given["student_weight"])[0].isfinite().all()
    assert functional.linear_cosine(**given, mask=torch.zeros_like(MASK)) == 0


def test_beside_a_hard_label_each_has_its_own_gradient() -> None:
    given, labels = inputs(), torch.arange(12) % 11
    student, teacher = (
        Projection(*(given[f"{role}_{name}"] for name in ("hidden", "weight", "bias")))
        for role in ("student", "teacher")
    )
    terms = [(0.7, CosineTerm()), (0.3, HardLabelTerm())]
    soft, hard = chunked_losses(student, terms, teacher, labels, chunk_size=5)
    theirs = 0.7 * whole(given).sum() + 0.3 * F.cross_entropy(student.logits(), labels, reduction="sum")
    assert_same(0.7 * soft + 0.3 * hard, theirs, given)


def test_never_holds_more_than_a_chunk() -> None:
    words, tokens, size = 4096, 128, 16
    student = [normal(tokens, 8, seed=0).requires_grad_(), normal(words, 8, seed=1).requires_grad_()]
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, Tensor))
            return out

    with Watch():
        functional.linear_cosine(
            *student, normal(tokens, 8, seed=2), normal(words, 8, seed=3), chunk_size=size
        ).backward()
    assert max(sizes) == size * words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, '`reduction` to be "mean" or "sum"'),
        ({"chunk_size": 0}, "`chunk_size`"),
        ({"num_items": 0}, "`num_items` to be above 0"),
        ({"teacher_hidden": torch.zeros(2, 4)}, "to have the same tokens"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.linear_cosine(**{**inputs(), **change})


def test_is_no_divergence_of_probabilities() -> None:
    with pytest.raises(ValueError, match=r"`divergence` to be one of .*'cosine'"):
        functional.linear_soft_target(*[torch.ones(2, 2)] * 4, divergence="cosine")  # type: ignore[arg-type]
