"""Against the released peers of benchmarks/requirements.txt: where they agree and differ (docs/peers.md)."""

import importlib
import importlib.util
import sys
import types
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_distill import functional

pytestmark = pytest.mark.filterwarnings("ignore")


def peer(name: str) -> ModuleType:
    """A module of a peer; the test skips where it is absent or does not import here."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"needs `{name}` of benchmarks/requirements.txt: {type(error).__name__}: {error}")


def textbrewer_losses() -> ModuleType:
    """textbrewer's losses without its package, whose trainers import tensorboard."""
    spec = importlib.util.find_spec("textbrewer")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs `textbrewer` of benchmarks/requirements.txt, which is absent")
    package = types.ModuleType("textbrewer")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["textbrewer"] = package
    try:
        return importlib.import_module("textbrewer.losses")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "textbrewer"]:
            del sys.modules[name]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_trl_generalized_jsd(beta: float) -> None:
    trainer = peer("trl.experimental.gkd.gkd_trainer").GKDTrainer
    student, teacher = normal(2, 4, 9), normal(2, 4, 9, seed=1)
    labels = torch.where(MASK, 1, -100)
    theirs = trainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=1.0)
    ours = functional.soft_target(student, teacher, divergence="js", beta=beta, mask=MASK)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    # At another temperature theirs lacks its square.
    theirs = trainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=3.0)
    ours = functional.soft_target(student, teacher, divergence="js", beta=beta, mask=MASK, temperature=3.0)
    torch.testing.assert_close(ours, 9 * theirs, rtol=1e-6, atol=1e-6)


def test_liger_jsd() -> None:
    jsd = peer("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction
    student, teacher = normal(8, 9), normal(8, 9, seed=1)
    theirs = jsd.distillation_loss_fn(student, teacher, beta=0.3)
    ours = functional.soft_target(student, teacher, divergence="js", beta=0.3, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def linear(words: int = 30, teacher_words: int = 30) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states and weights of student and teacher, and labels."""
    made = [normal(12, 6), normal(words, 6, seed=1), normal(12, 8, seed=2), normal(teacher_words, 8, seed=3)]
    made[0].requires_grad_()
    made[1].requires_grad_()
    return made, torch.where(torch.arange(12) % 4 == 0, -100, torch.arange(12))


def assert_same_gradients(ours: torch.Tensor, theirs: torch.Tensor, models: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for one, other in zip(*(torch.autograd.grad(loss, models[:2]) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("beta", "divergence"), [(0.0, "forward_kl"), (0.3, "js"), (1.0, "reverse_kl")])
def test_liger_fused_linear_jsd(beta: float, divergence: Any) -> None:
    loss = peer("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDLoss
    models, labels = linear()
    options = {"divergence": divergence, "beta": beta if divergence == "js" else 0.5}
    ours = functional.linear_soft_target(*models, labels, soft_weight=0.7, hard_weight=0.3, chunk_size=5, **options)
    theirs = loss(0.3, 0.7, beta, compiled=False, chunk_size=4)(*models, labels)
    assert_same_gradients(ours.loss, theirs, models)
    # At another temperature theirs lacks its square.
    theirs = loss(0.0, 1.0, beta, temperature=3.0, compiled=False, chunk_size=4)(*models, labels)
    ours = functional.linear_soft_target(*models, labels, temperature=3.0, **options)
    assert_same_gradients(ours.loss, 9 * theirs, models)


def test_liger_takes_the_padding_of_the_larger_vocabulary_for_words() -> None:
    loss = peer("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDLoss
    models, labels = linear(30, 34)
    theirs = loss(0.0, 1.0, 0.0, compiled=False)(*models, labels)
    student = F.pad(models[0] @ models[1].T, (0, 4))
    mask = labels != -100
    torch.testing.assert_close(functional.soft_target(student, models[2] @ models[3].T, mask=mask), theirs)
    ours = functional.linear_soft_target(*models, labels).loss
    torch.testing.assert_close(
        ours, functional.soft_target(student[:, :30], models[2] @ models[3][:30].T, mask=mask), rtol=1e-6, atol=1e-6
    )
    assert (ours - theirs).abs() > 0.09


def test_liger_fused_linear_cosine() -> None:
    loss = peer("liger_kernel.chunked_loss.cosine_similarity_loss").LigerFusedLinearCosineSimilarityLoss
    models, labels = linear()
    theirs = loss(0.0, 1.0, 1.0, compiled=False, chunk_size=4)(*models, labels)
    assert_same_gradients(functional.linear_cosine(*models, mask=labels != -100, chunk_size=5), theirs, models)


@pytest.mark.parametrize(("beta", "divergence"), [(0.0, "forward_kl"), (0.3, "js"), (1.0, "reverse_kl")])
def test_trl_chunked_divergence(beta: float, divergence: Any) -> None:
    chunked = peer("trl.trainer.distillation_trainer")._chunked_divergence_loss
    models, labels = linear()
    mask = (labels != -100)[None]

    def theirs(**options: Any) -> torch.Tensor:
        return chunked(models[0][None], models[2][None], models[1], models[3], mask, beta, **options)[0]

    options = {"divergence": divergence, "beta": beta if divergence == "js" else 0.5, "chunk_size": 5}
    caps = {"student_softcap": 3.0, "teacher_softcap": 2.0, "student_logit_scale": 0.5, "teacher_logit_scale": 2.0}
    ours = functional.linear_soft_target(*models, labels, **options, **caps)
    their_caps = {name.replace("softcap", "final_logit_softcapping"): value for name, value in caps.items()}
    assert_same_gradients(ours.loss, theirs(**their_caps), models)
    # At another temperature theirs lacks its square.
    ours = functional.linear_soft_target(*models, labels, temperature=3.0, **options)
    assert_same_gradients(ours.loss, 9 * theirs(temperature=3.0), models)


def test_torchdistill_kd_drops_the_squared_temperature_without_labels() -> None:
    losses = peer("torchdistill.losses.mid_level")
    student, teacher = normal(4, 5), normal(4, 5, seed=1)
    theirs = losses.KDLoss("m", "o", "m", "o", temperature=4.0, beta=1.0)
    theirs = theirs({"m": {"o": student}}, {"m": {"o": teacher}})
    ours = functional.soft_target(student, teacher, temperature=4.0)
    torch.testing.assert_close(ours, 16 * theirs, rtol=1e-6, atol=1e-6)


def test_torchdistill_kd_normalises_tokens_over_the_wrong_dimension() -> None:
    losses = peer("torchdistill.losses.mid_level")
    student, teacher = normal(2, 4, 5), normal(2, 4, 5, seed=1)
    theirs = losses.KDLoss("m", "o", "m", "o", temperature=1.0, beta=1.0)
    theirs = theirs({"m": {"o": student}}, {"m": {"o": teacher}})
    over_tokens = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(theirs, over_tokens)
    assert (functional.soft_target(student, teacher) - theirs).abs() > 0.1


def test_torchdistill_correlation_and_z_scores() -> None:
    losses = peer("torchdistill.losses.mid_level")
    student, teacher = normal(6, 5), normal(6, 5, seed=1)
    theirs = losses.DISTLoss("m", "o", "m", "o", beta=2.0, gamma=3.0, tau=4.0)
    theirs = theirs({"m": {"o": student}}, {"m": {"o": teacher}})
    ours = functional.correlation(student, teacher, temperature=4.0, beta=2.0, gamma=3.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    theirs = losses.LogitStdKDLoss("m", "o", "m", "o", temperature=2.0, beta=1.0)
    theirs = theirs({"m": {"o": student}}, {"m": {"o": teacher}})
    ours = functional.soft_target(student, teacher, temperature=2.0, standardize=True)
    # As of its `KDLoss`, the squared temperature is lacking without a hard loss.
    torch.testing.assert_close(ours, 4 * theirs, rtol=1e-5, atol=1e-6)


def test_torchdistill_relations_and_transfer() -> None:
    losses = peer("torchdistill.losses.mid_level")
    student, teacher = normal(5, 6), normal(5, 8, seed=1)
    for distance, angle, ours in ((1.0, 0.0, functional.relational_distance), (0.0, 1.0, functional.relational_angle)):
        rkd = losses.RKDLoss("m", "m", distance, angle, "mean")
        theirs = rkd({"m": {"output": student}}, {"m": {"output": teacher}})
        torch.testing.assert_close(ours(student, teacher), theirs, rtol=1e-5, atol=1e-6)
    student, teacher = normal(3, 6, 4, 4), normal(3, 8, 4, 4, seed=1)
    ends = {"io": "output", "path": "m"}
    at = losses.ATLoss({"pair": {"student": ends, "teacher": ends}}, mode="code")
    theirs = at({"m": {"output": student}}, {"m": {"output": teacher}})
    s, t = (x.flatten(2).transpose(1, 2) for x in (student, teacher))
    torch.testing.assert_close(functional.attention_transfer(s, t), theirs, rtol=1e-6, atol=1e-7)


def test_torchdistill_similarities_are_divided_by_their_sum_instead_of_their_length() -> None:
    losses = peer("torchdistill.losses.mid_level")
    student, teacher = normal(5, 6), normal(5, 8, seed=1)
    theirs = losses.SPKDLoss("m", "m", "batchmean")({"m": {"output": student}}, {"m": {"output": teacher}})
    grams = [x @ x.T for x in (student, teacher)]
    by_sum = [gram / gram.abs().sum(1, keepdim=True) for gram in grams]
    torch.testing.assert_close(theirs, (by_sum[0] - by_sum[1]).square().mean())
    # The paper's equation 1: each row has Euclidean length 1.
    by_length = [gram / gram.square().sum(1, keepdim=True).sqrt() for gram in grams]
    paper = (by_length[0] - by_length[1]).square().mean()
    torch.testing.assert_close(functional.similarity_preserving(student, teacher), paper)
    assert paper > 2 * theirs


def test_textbrewer_features() -> None:
    losses = textbrewer_losses()
    student, teacher = normal(2, 4, 6), normal(2, 4, 6, seed=1)
    second = normal(2, 4, 6, seed=2), normal(2, 4, 6, seed=3)
    for ours, theirs in (
        (functional.hidden_state_mse(student, teacher, mask=MASK), losses.hid_mse_loss(student, teacher, MASK)),
        (functional.hidden_state_cosine(student, teacher, mask=MASK), losses.cos_loss(student, teacher, MASK)),
        (functional.normalized_mse(student[:, 0], teacher[:, 0]), losses.pkd_loss(student, teacher)),
        (functional.logits_mse(student, teacher), losses.kd_mse_loss(student, teacher)),
        (
            functional.flow(student, second[0], teacher, second[1], mask=MASK),
            losses.fsp_loss([student, second[0]], [teacher, second[1]], MASK),
        ),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_textbrewer_cross_entropy_is_not_zero_where_student_equals_teacher() -> None:
    losses = textbrewer_losses()
    student, teacher = normal(4, 5), normal(4, 5, seed=1)
    log_p = (teacher / 2).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    theirs = losses.kd_ce_loss(student, teacher, temperature=2)
    torch.testing.assert_close(functional.soft_target(student, teacher, temperature=2.0), 4 * (theirs - entropy))
    torch.testing.assert_close(losses.kd_ce_loss(teacher, teacher, temperature=2), entropy)


def test_textbrewer_attention_mse() -> None:
    losses = textbrewer_losses()
    student, teacher = (normal(2, 3, 4, 4, seed=seed).softmax(-1) for seed in (0, 1))
    torch.testing.assert_close(functional.attention_map(student, teacher), losses.att_mse_loss(student, teacher))
    everything = torch.ones(2, 4, dtype=torch.bool)
    ours = functional.attention_map(student, teacher, mask=everything)
    torch.testing.assert_close(ours, losses.att_mse_loss(student, teacher, everything))


def test_textbrewer_nst_changes_when_a_mask_that_masks_nothing_is_given() -> None:
    losses = textbrewer_losses()
    student, teacher = normal(2, 4, 6), normal(2, 4, 6, seed=1)
    without = losses.mmd_loss([student, student], [teacher, teacher])
    with_mask = losses.mmd_loss([student, student], [teacher, teacher], torch.ones(2, 4))
    # Divided by the length (4) squared in place of the width (6) squared.
    torch.testing.assert_close(with_mask, without * (6 / 4) ** 2)
    everything = torch.ones(2, 4, dtype=torch.bool)
    ours = functional.neuron_selectivity(student, teacher)
    torch.testing.assert_close(functional.neuron_selectivity(student, teacher, mask=everything), ours)


def test_trl_gold_stretches_and_their_probabilities() -> None:
    gold = peer("trl.experimental.gold.gold_trainer").ULDLoss
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ends = [torch.randperm(20, generator=generator)[:size].sort().values + 1 for size in (9, 13)]
        ends = [torch.cat([one, torch.tensor([21])]) for one in ends]
        offsets = [torch.stack([torch.cat([one.new_zeros(1), one[:-1]]), one], -1) for one in ends]
        theirs = gold._align_by_byte_offsets(*(one.tolist() for one in offsets))
        spans = functional.shared_spans(*(one[None] for one in offsets))
        for own, groups in zip(spans, theirs, strict=True):
            assert [(own[0] == number).nonzero()[:, 0].tolist() for number in range(len(groups))] == groups
        # The entry of the first piece in their merged prediction is what the pieces have together.
        logits, labels = torch.randn(len(ends[0]), 7, generator=generator), torch.arange(len(ends[0])) % 7
        merger = types.SimpleNamespace(token_merge_strategy="observed")
        merged = gold._merge_probabilities_with_alignment_groups(merger, logits.softmax(-1), theirs[0], labels)
        together = torch.stack([merged[i, labels[group[0]]] for i, group in enumerate(theirs[0])])
        other = torch.full((1, len(ends[1]), 7), -1e9)
        other[..., 0] = 0
        # A teacher to whom the text is impossible: the direct part of the loss is the student's probability.
        ours = functional.merged_universal_logit(
            logits[None], other, labels[None], torch.ones_like(ends[1])[None], *spans, unmatched_weight=0.0
        )
        torch.testing.assert_close(ours, together.mean())
