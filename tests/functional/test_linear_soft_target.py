"""linear_soft_target against the losses on whole logits, by autograd."""

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_distill import functional
from lightning_distill.functional.chunked import chunked_losses
from lightning_distill.functional.divergences import Divergence
from lightning_distill.functional.projection import Projection, TopK
from lightning_distill.functional.terms import HardLabelTerm, SoftTargetTerm

DIVERGENCES = get_args(Divergence)
TOKENS, WORDS, WIDTH, TEACHER_WIDTH = 23, 50, 6, 9


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(words: int = WORDS, teacher_words: int = WORDS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = {
        "student_hidden": normal(TOKENS, WIDTH, seed=0),
        "student_weight": normal(words, WIDTH, seed=1),
        "student_bias": normal(words, seed=2),
        "teacher_hidden": normal(TOKENS, TEACHER_WIDTH, seed=3),
        "teacher_weight": normal(teacher_words, TEACHER_WIDTH, seed=4),
        "teacher_bias": normal(teacher_words, seed=5),
    }
    made = {name: value.to(dtype) for name, value in made.items()}
    for name in ("student_hidden", "student_weight", "student_bias"):
        made[name].requires_grad_()
    return made


def labels(share: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    words = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    return words.masked_fill(torch.rand(TOKENS, generator=generator) > share, -100)


def eager(
    given: dict[str, Tensor],
    words: Tensor | None,
    *,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    caps: tuple[float | None, float | None] = (None, None),
    scales: tuple[float, float] = (1.0, 1.0),
    **options: Any,
) -> Tensor:
    """The loss on whole logits, as a model and the objectives compute it."""
    whole = []
    for role, cap, scale in zip(("student", "teacher"), caps, scales, strict=True):
        logits = scale * F.linear(given[f"{role}_hidden"], given[f"{role}_weight"], given[f"{role}_bias"])
        whole.append(logits if cap is None else cap * torch.tanh(logits / cap))
    shared = min(logits.shape[-1] for logits in whole)
    student, teacher = (logits[..., :shared] for logits in whole)
    mask = None if words is None else words != -100
    loss = soft_weight * functional.soft_target(student, teacher, mask=mask, **options)
    if words is not None:
        loss = loss + hard_weight * functional.hard_label(student, words, label_smoothing=label_smoothing)
    return loss


def gradients(loss: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    wanted = [value for value in given.values() if value.requires_grad]
    return list(torch.autograd.grad(loss, wanted, retain_graph=True))


def assert_same(ours: Tensor, theirs: Tensor, given: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for one, other in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("chunk_size", [1, 7, "auto"])
def test_equals_the_losses_on_whole_logits(divergence: Any, temperature: float, share: float, chunk_size: Any) -> None:
    given, words = inputs(), labels(share)
    options = {"temperature": temperature, "divergence": divergence, "beta": 0.3, "alpha": 0.2}
    options |= {"soft_weight": 0.7, "hard_weight": 0.3, "label_smoothing": 0.1}
    ours = functional.linear_soft_target(labels=words, chunk_size=chunk_size, **given, **options)  # type: ignore[arg-type]
    assert_same(ours.loss, eager(given, words, **options), given)
    torch.testing.assert_close(0.7 * ours.soft_target + 0.3 * ours.hard_label, ours.loss)


# No numerical derivative knows that the weights of the adaptive one are constants.
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "adaptive_kl"])
def test_gradcheck(divergence: Any) -> None:
    given, words = inputs(dtype=torch.float64), labels()
    student = [given.pop(name) for name in ("student_hidden", "student_weight", "student_bias")]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear_soft_target(
            hidden,
            weight,
            given["teacher_hidden"],
            given["teacher_weight"],
            words,
            student_bias=bias,
            temperature=2.0,
            divergence=divergence,
            hard_weight=0.5,
            student_softcap=3.0,
            student_logit_scale=0.7,
            chunk_size=5,
        ).loss

    # A second backward computes the gradient anew, with the factor inside and not after it.
    assert torch.autograd.gradcheck(loss, student, fast_mode=True, nondet_tol=1e-12)


@given_any(
    scale=st.floats(0.1, 30.0),
    temperature=st.floats(0.3, 8.0),
    divergence=st.sampled_from(DIVERGENCES),
    chunk_size=st.integers(1, TOKENS + 3),
    soft=st.floats(0.0, 2.0),
    hard=st.floats(0.0, 2.0),
)
@settings(max_examples=40, deadline=None)
def test_any_size_of_logits(
    scale: float, temperature: float, divergence: Any, chunk_size: int, soft: float, hard: float
) -> None:
    given, words = inputs(dtype=torch.float64), labels()
    options = {"temperature": temperature, "divergence": divergence, "soft_weight": soft, "hard_weight": hard}
    ours = functional.linear_soft_target(
        labels=words,
        chunk_size=chunk_size,
        student_logit_scale=scale,
        teacher_logit_scale=scale,
        **given,
        **options,  # type: ignore[arg-type]
    )
    assert_same(ours.loss, eager(given, words, scales=(scale, scale), **options), given, 1e-9)


@pytest.mark.parametrize(("caps", "scales"), [((5.0, None), (1.0, 1.0)), ((4.0, 3.0), (0.5, 2.0))])
def test_softcaps_and_scales(caps: tuple[float | None, float | None], scales: tuple[float, float]) -> None:
    given, words = inputs(), labels()
    ours = functional.linear_soft_target(
        labels=words,
        hard_weight=0.5,
        temperature=2.0,
        student_softcap=caps[0],
        teacher_softcap=caps[1],
        student_logit_scale=scales[0],
        teacher_logit_scale=scales[1],
        chunk_size=4,
        **given,
    )
    assert_same(ours.loss, eager(given, words, hard_weight=0.5, temperature=2.0, caps=caps, scales=scales), given)


@pytest.mark.parametrize(("words", "teacher_words"), [(WORDS, WORDS + 6), (WORDS + 6, WORDS)])
def test_vocabularies_that_differ_in_padding(words: int, teacher_words: int) -> None:
    given = inputs(words, teacher_words)
    ours = functional.linear_soft_target(labels=labels(), hard_weight=0.5, chunk_size=4, **given)
    assert_same(ours.loss, eager(given, labels(), hard_weight=0.5), given)
    # A second backward, for which the gradient is computed once more.
    assert not gradients(ours.loss, given)[1][WORDS:].any()
    assert_same(ours.loss, eager(given, labels(), hard_weight=0.5), given)


def test_a_tied_weight_gets_the_gradient_of_both_uses() -> None:
    given = inputs()
    ids, weight = torch.arange(TOKENS) % WORDS, given["student_weight"]
    tied = {**given, "student_hidden": torch.tanh(F.embedding(ids, weight))}
    ours = functional.linear_soft_target(labels=labels(), hard_weight=0.5, chunk_size=4, **tied)
    (one,) = torch.autograd.grad(ours.loss, weight)
    tied["student_hidden"] = torch.tanh(F.embedding(ids, weight))
    (other,) = torch.autograd.grad(eager(tied, labels(), hard_weight=0.5), weight)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_another_total_than_announced_has_its_own_gradient() -> None:
    given, words = inputs(), labels()
    student = Projection(given["student_hidden"], given["student_weight"], given["student_bias"])
    teacher = Projection(given["teacher_hidden"], given["teacher_weight"], given["teacher_bias"])
    count = (words != -100).sum()
    for weigh in (lambda soft, hard: 3 * soft + hard, lambda soft, hard: soft * hard, lambda soft, hard: hard):
        terms = [(0.7, SoftTargetTerm()), (0.3, HardLabelTerm())]
        sums = chunked_losses(student, terms, teacher, words, words != -100, chunk_size=4)
        theirs = (eager(given, words), eager(given, words, soft_weight=0.0, hard_weight=1.0))
        assert_same(weigh(*(value / count for value in sums)), weigh(*theirs), given)


def test_without_a_gradient_or_a_token() -> None:
    given = inputs()
    with torch.no_grad():
        ours = functional.linear_soft_target(labels=labels(), hard_weight=0.5, **given).loss
    torch.testing.assert_close(ours, eager(given, labels(), hard_weight=0.5), rtol=1e-6, atol=1e-6)
    assert not ours.requires_grad
    nothing = functional.linear_soft_target(labels=torch.full((TOKENS,), -100), hard_weight=0.5, **given)
    assert nothing.loss == 0
    assert not any(gradient.any() for gradient in gradients(nothing.loss, given))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_are_accumulated_in_float32(autocast: bool) -> None:
    given, words = inputs(dtype=torch.float32 if autocast else torch.bfloat16), labels(1.0)
    options = {"temperature": 2.0, "hard_weight": 0.5}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = functional.linear_soft_target(labels=words, chunk_size=1, **given, **options).loss  # type: ignore[arg-type]
        theirs = eager(given, words, **options)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    exact = inputs(dtype=torch.float64)
    if not autocast:
        exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in given.items()}
    reference = gradients(eager(exact, words, **options), exact)
    ours_error, theirs_error = (
        max(float((a - b).abs().max()) for a, b in zip(gradients(loss, given), reference, strict=True))
        for loss in (ours, theirs)
    )
    # Of 23 chunks of one token each; sums in bfloat16 would be off by several times as much.
    assert ours_error < 1.5 * theirs_error


def top_k(teacher_logits: Tensor, k: int, temperature: float) -> TopK:
    return TopK(*(teacher_logits / temperature).log_softmax(-1).topk(k))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 5, WORDS])
def test_the_k_best_words_of_a_teacher(temperature: float, k: int) -> None:
    given, words = inputs(), labels()
    student = Projection(given["student_hidden"], given["student_weight"], given["student_bias"])
    logits = F.linear(given["teacher_hidden"], given["teacher_weight"], given["teacher_bias"])
    best, mask = top_k(logits, k, temperature), words != -100
    terms = [(1.0, SoftTargetTerm(temperature)), (1.0, HardLabelTerm())]
    soft, _ = chunked_losses(student, terms, {temperature: best}, words, mask, chunk_size=4)
    theirs = functional.top_k_soft_target(
        student.logits(), best.log_probs, best.classes, temperature=temperature, mask=mask, reduction="sum"
    )
    assert_same(soft / mask.sum(), theirs / mask.sum(), given)
    # The teacher's own logits, as a cache of all of them has them, are the same as its hidden states.
    whole, _ = chunked_losses(student, terms, logits, words, mask, chunk_size=4)
    assert_same(whole / mask.sum(), eager(given, words, temperature=temperature), given)


def test_never_holds_more_than_a_chunk() -> None:
    words, tokens, size = 4096, 512, 32
    hidden, weight = normal(tokens, 8, seed=0).requires_grad_(), normal(words, 8, seed=1).requires_grad_()
    teacher, teacher_weight = normal(tokens, 8, seed=2), normal(words, 8, seed=3)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, Tensor))
            return out

    with Watch():
        functional.linear_soft_target(
            hidden, weight, teacher, teacher_weight, torch.arange(tokens), hard_weight=1.0, chunk_size=size
        ).loss.backward()
    assert max(sizes) == size * words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl"}, "`divergence` to be one of"),
        ({"temperature": 0.0}, "`temperature` to be finite and above 0, but got 0.0"),
        ({"alpha": 1.0}, r"in \(0, 1\), but got 1.0"),
        ({"label_smoothing": 1.0}, r"`label_smoothing` to be in \[0, 1\)"),
        ({"chunk_size": 0}, '`chunk_size` to be "auto" or at least 1, but got 0'),
        ({"reduction": "none"}, '`reduction` to be "mean" or "sum"'),
        ({"labels": None, "hard_weight": 1.0}, "`labels` to be given"),
        ({"teacher_hidden": torch.zeros(2, TEACHER_WIDTH)}, "to have the same tokens"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.linear_soft_target(**{**inputs(), "labels": labels(), **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_compiled_on_cuda(divergence: Any) -> None:
    words = labels().cuda()
    given = {name: x.detach().cuda().requires_grad_(x.requires_grad) for name, x in inputs().items()}
    options = {"temperature": 2.0, "divergence": divergence, "hard_weight": 0.5}
    ours = functional.linear_soft_target(labels=words, chunk_size=7, **given, **options)
    assert_same(ours.loss, eager(given, words, **options), given, 1e-5)


@pytest.mark.parametrize(("beta", "limit"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_js_at_its_ends_is_what_it_tends_to_over_its_weight(beta: float, limit: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    wanted = functional.soft_target(student, teacher, divergence=limit)
    torch.testing.assert_close(functional.soft_target(student, teacher, divergence="js", beta=beta), wanted)
    near = abs(beta - 1e-6)
    inside = functional.soft_target(student, teacher, divergence="js", beta=near) / 1e-6
    torch.testing.assert_close(inside, wanted, rtol=1e-4, atol=0)
    weight, other = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    both = [
        functional.linear_soft_target(student, weight, teacher, other, divergence=name, beta=beta).loss
        for name in ("js", limit)
    ]
    torch.testing.assert_close(*both)


def test_a_label_that_only_the_student_knows_is_said() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(12, 8)
    labels = torch.tensor([0, 9, 10, -100])
    with pytest.raises(ValueError, match=r"`labels` to be below 10.*got 10, which is a word of the student"):
        functional.linear_soft_target(hidden, weight, hidden, weight[:10], labels, hard_weight=1.0)
    for wrong in (12, -5):
        with pytest.raises(ValueError, match=rf"`labels` to be below 12.*got {wrong}\."):
            functional.linear_soft_target(hidden, weight, hidden, weight, labels.clamp(max=wrong).fill_(wrong))


def test_an_outside_denominator_takes_the_place_of_the_count() -> None:
    student, teacher, labels = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([0, 8, -100, 3])
    mask = labels != -100
    for loss in (
        lambda **options: functional.soft_target(student, teacher, mask=mask, **options),
        lambda **options: functional.logits_mse(student, teacher, mask=mask, **options),
        lambda **options: functional.logits_cosine(student, teacher, mask=mask, **options),
        lambda **options: functional.hidden_state_mse(student, teacher, mask=mask, **options),
        lambda **options: functional.hidden_state_cosine(student, teacher, mask=mask, **options),
        lambda **options: functional.decoupled(student, teacher, labels, **options),
        lambda **options: functional.hard_label(student, labels, mask=mask, **options),
        lambda **options: functional.universal_logit(student, teacher, mask=mask, **options),
        lambda **options: functional.linear_soft_target(
            student, torch.eye(9), teacher, torch.eye(9), labels, **options
        )[0],
    ):
        torch.testing.assert_close(loss(num_items=20), loss(reduction="sum") / 20)
        torch.testing.assert_close(loss(num_items=torch.tensor(3)), loss())
        with pytest.raises(ValueError, match="`num_items` to be above 0, but got 0"):
            loss(num_items=0)
