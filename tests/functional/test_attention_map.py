"""The blocks against the maps they avoid, on the masks that models really pass."""

import importlib

import pytest
import torch
from torch import Tensor

from lightning_distill import functional
from lightning_distill.functional.attention import Attention

# The package gives this name to the function.
module = importlib.import_module("lightning_distill.functional.attention_map")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(kind: str, student_heads: int = 4) -> tuple[Attention, Attention, Tensor | None, list[Tensor]]:
    token_mask = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
    if kind == "left_padded":
        token_mask = token_mask.flip(1)
    bias = None
    mask: Tensor | None = token_mask[:, None, None, :]
    if kind in ("causal", "nothing"):
        mask, token_mask = None, None
    elif kind in ("causal_mask", "left_padded"):
        mask = mask & torch.ones(7, 7).tril().bool()
    elif kind == "additive":
        mask = torch.zeros(3, 1, 1, 7, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    elif kind == "bias":
        bias = normal(1, 4, 7, 7, seed=9)
    leaves = [normal(3, student_heads, 7, 5, seed=seed).requires_grad_() for seed in (1, 2)]
    causal = kind == "causal"
    student = Attention(leaves[0], leaves[1], leaves[1], mask, 0.4, causal, bias)
    teacher = Attention(*(normal(3, 4, 7, 6, seed=seed) for seed in (3, 4, 4)), mask, 0.3, causal)
    return student, teacher, token_mask, leaves


@pytest.mark.parametrize("divergence", ["mse", "kl"])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("kind", ["nothing", "padded", "causal", "causal_mask", "left_padded", "additive", "bias"])
@pytest.mark.parametrize("elements", [1, 60, 2**20])
def test_blocks_equal_maps(
    kind: str, heads: int, divergence: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "bias" and heads != 4:
        pytest.skip("the bias has one map per head")
    monkeypatch.setitem(module._BLOCK_ELEMENTS, "cpu", elements)
    student, teacher, mask, leaves = pair(kind, heads)
    weights = normal(3, 7, seed=5).abs()
    values = functional.attention_divergence(student, teacher, divergence=divergence, mask=mask, reduction="none")
    gradients = torch.autograd.grad((weights * values).sum(), leaves)

    maps = [student.probabilities(), teacher.probabilities()]
    if heads != 4:
        maps = [x.mean(1, keepdim=True) for x in maps]
    expected = functional.attention_map(*maps, divergence=divergence, mask=mask, reduction="none")
    expected_gradients = torch.autograd.grad((weights * expected).sum(), leaves)
    torch.testing.assert_close(values, expected)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_learned_bias_gets_its_gradient() -> None:
    student, teacher, mask, _ = pair("bias")
    assert student.position_bias is not None
    student.position_bias.requires_grad_()
    functional.attention_divergence(student, teacher, mask=mask).backward()
    assert student.position_bias.grad is not None
    assert student.position_bias.grad.abs().sum() > 0


def test_no_map_is_kept_for_the_backward() -> None:
    query = torch.randn(1, 2, 256, 4, requires_grad=True)
    attention = Attention(query, query, query, None, 0.5, False)
    saved = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        functional.attention_divergence(attention, attention).backward()
    assert max(saved) < 256 * 256


def test_a_key_that_only_the_teacher_sees_gives_no_gradient_to_it() -> None:
    query, key = normal(1, 1, 4, 3, seed=1), normal(1, 1, 4, 3, seed=2).requires_grad_()
    sees = torch.tensor([True, True, True, False])[None, None, None]
    student = Attention(query, key, key, sees, 1.0, False)
    teacher = Attention(query, key.detach(), key.detach(), None, 1.0, False)
    loss = functional.attention_divergence(student, teacher, divergence="kl")
    loss.backward()
    assert loss.isfinite()
    assert key.grad is not None
    assert not key.grad[0, 0, 3].any()
    assert key.grad[0, 0, :3].any()
