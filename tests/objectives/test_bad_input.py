"""What is refused, when, and that the message names the argument and the objective."""

import math
from collections.abc import Callable

import pytest
import torch

from lightning_distill import functional
from lightning_distill.functional.projection import TopK
from lightning_distill.objectives import (
    AttentionMap,
    AttentionRelation,
    Contrastive,
    Correlation,
    CurriculumTemperature,
    Decoupled,
    Flow,
    GradientNormBalance,
    HardLabel,
    HiddenState,
    LinearSchedule,
    Objective,
    RelationalDistance,
    SoftTarget,
    StepSchedule,
    TopKSoftTarget,
    UncertaintyBalance,
)
from lightning_distill.signals.description import ModelInfo
from lightning_distill.signals.signals import Signals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftTarget(weight=-1.0), "`weight` of objective `soft_target`.*-1.0"),
        (lambda: HiddenState(weight=math.nan), "`weight` of objective `hidden_state`.*nan"),
        (lambda: SoftTarget(weight=LinearSchedule(1.0, -1.0)), "`weight` of objective `soft_target`.*progress 0.6"),
        (lambda: SoftTarget(temperature=0.0), "`temperature` of objective `soft_target`.*0.0"),
        (lambda: SoftTarget(temperature=math.inf, name="mine"), "`temperature` of objective `mine`"),
        (lambda: SoftTarget(divergence="kl"), "`divergence` of objective.*'forward_kl'"),
        (lambda: SoftTarget(beta=1.01), "`beta`"),
        (lambda: SoftTarget(alpha=0.0), "`alpha`"),
        (lambda: Decoupled(beta=-1.0), "`beta` of objective `decoupled`"),
        (lambda: Correlation(gamma=-1.0), "`gamma` of objective `correlation`"),
        (lambda: CurriculumTemperature(0.5), "`temperature` of objective `curriculum_temperature`.*1.0 and 21.0"),
        (lambda: CurriculumTemperature(lowest=0.0), "`lowest` of objective `curriculum_temperature`"),
        (lambda: CurriculumTemperature(2.0, highest=1.0), "`highest` of objective.*above `lowest`"),
        (lambda: CurriculumTemperature(warmup=0.0), "`warmup` of objective `curriculum_temperature`"),
        (lambda: TopKSoftTarget(0), "`k`"),
        (lambda: HardLabel(1.0), "`label_smoothing` of objective `hard_label`"),
        (lambda: HiddenState(None), "`layers` of objective `hidden_state`"),
        (lambda: AttentionMap(divergence="l1"), "`divergence` of objective `attention_map`"),
        (lambda: AttentionRelation(()), "`kinds` of objective `attention_relation`"),
        (lambda: AttentionRelation(("qq", "xx")), "`kinds`"),
        (lambda: RelationalDistance(pooling="max"), "`pooling` of objective `relational_distance`"),
        (lambda: Contrastive(temperature=0.0), "`temperature` of objective `contrastive`"),
        (lambda: LinearSchedule(1.0, 0.0, begin=0.5, finish=0.5), "`begin` and `finish`"),
        (lambda: StepSchedule([1.0, 2.0], []), "`milestones`"),
        (lambda: StepSchedule([1.0, 2.0, 3.0], [0.6, 0.5]), "`milestones`"),
        (lambda: UncertaintyBalance(["a", "a"]), "`names`"),
        (lambda: GradientNormBalance(["a"], decay=1.0), "`decay`"),
    ],
)
def test_at_construction(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


STACK = ModelInfo(2, 6, 2, 2, 3, {"encoder": None, "encoder.layer.0": None, "encoder.layer.1": None, "head": 4})
DEEP = ModelInfo(4, 9, 4, 4, 3, {"encoder.layer.0": None, "head": 8})
PLAIN = ModelInfo(modules={"0": 3, "1": None})


@pytest.mark.parametrize(
    ("objective", "student", "teacher", "message"),
    [
        (HiddenState(), DEEP, STACK, "`hidden_state`.*student of 4 and a teacher of 2 layers"),
        (HiddenState([(0, 9)]), STACK, DEEP, "`hidden_state`.*student of 2 and a teacher of 4 layers"),
        (HiddenState(), PLAIN, DEEP, "`layers` of objective `hidden_state` to be pairs of module paths.*student"),
        (HiddenState([("encoder.layr.0", "head")]), STACK, DEEP, r"modules of the student.*'encoder\.layer\.0'"),
        (HiddenState([("head", "encoder.layer0")]), STACK, DEEP, r"modules of the teacher.*'encoder\.layer\.0'"),
        (HiddenState(projection=False), STACK, DEEP, "`projection` of objective `hidden_state`.*6.*9"),
        (
            HiddenState([("encoder.layer.0", "encoder.layer.0")], projection=True),
            STACK,
            DEEP,
            r"`widths` of objective `hidden_state`.*widths=\(student, teacher\)",
        ),
        (Flow([(0, 1)]), STACK, DEEP, "`layers` of objective `flow`.*two pairs"),
        (AttentionMap(), PLAIN, DEEP, "`attention_map`.*attention.*student"),
        (AttentionMap([(0, 4)]), STACK, DEEP, "`attention_map`.*teacher of 4 layers"),
        (AttentionRelation(relation_heads=4), STACK, DEEP, "`relation_heads` of objective `attention_relation`.*6.*4"),
    ],
)
def test_at_binding(objective: Objective, student: ModelInfo, teacher: ModelInfo, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective.bind(student, teacher)


def test_at_the_first_batch() -> None:
    long, short = torch.zeros(2, 5, 3), torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=r"same shape.*\[2, 5, 3\] and \[2, 4, 3\].*same tokens"):
        SoftTarget()(Signals(long), Signals(short))
    objective = HiddenState([(0, 0)])
    objective.bind(ModelInfo(1, 3), ModelInfo(1, 3))
    with pytest.raises(ValueError, match=r"`hidden_state`.*same tokens.*\[2, 5, 3\].*\[2, 4, 3\]"):
        objective(Signals(long, hidden_states={0: long}), Signals(short, hidden_states={0: short}))
    with pytest.raises(ValueError, match="`hard_label` to be given labels"):
        HardLabel()(Signals(long), None)
    with pytest.raises(ValueError, match="at least 2 classes"):
        functional.soft_target(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="`mask` to be bool"):
        functional.soft_target(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(2))


def test_regression_takes_the_squared_difference_of_the_logits() -> None:
    student = Signals(torch.tensor([[1.0], [2.0]]), labels=torch.tensor([0.0, 4.0]))
    teacher = Signals(torch.tensor([[3.0], [2.0]]))
    assert SoftTarget()(student, teacher).mean().item() == 2.0
    assert HardLabel()(student, teacher).mean().item() == 2.5


def test_z_scores_need_several_classes_and_all_of_them() -> None:
    two, value = (Signals(torch.zeros(2, width), labels=torch.zeros(2, dtype=torch.long)) for width in (2, 1))
    best = Signals(torch.zeros(2, 0), top_k={2.0: TopK(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.long))})
    for make in (SoftTarget, Decoupled):
        with pytest.raises(ValueError, match="`standardize` to be False for fewer than 3 classes, but got True for 2"):
            make(standardize=True)(two, two)
    with pytest.raises(ValueError, match=r"`standardize` of objective `soft_target`.*values and no classes"):
        SoftTarget(standardize=True)(value, value)
    with pytest.raises(ValueError, match=r"`standardize` of objective `soft_target`.*k best classes alone"):
        SoftTarget(standardize=True)(Signals(torch.zeros(2, 5)), best)
    assert SoftTarget(standardize=True).top_k_temperatures is None


@pytest.mark.parametrize("objective", [Correlation(), CurriculumTemperature(), Decoupled(), SoftTarget()])
def test_objectives_on_classes_refuse_one_class_and_others_than_the_students(objective: Objective) -> None:
    labels = torch.zeros(2, dtype=torch.long)
    if not isinstance(objective, SoftTarget):
        with pytest.raises(ValueError, match="at least 2 classes"):
            objective(Signals(torch.zeros(2, 1), labels), Signals(torch.zeros(2, 1)))
    with pytest.raises(ValueError, match=r"same shape.*\[2, 3\] and \[2, 4\]"):
        objective(Signals(torch.zeros(2, 3), labels), Signals(torch.zeros(2, 4)))


def test_schedules_move_weight_and_temperature() -> None:
    objective = SoftTarget(LinearSchedule(4.0, 2.0), weight=lambda progress: 1 - progress)
    assert (objective.temperature, objective.weight) == (4.0, 1.0)
    objective.set_progress(0.5)
    assert (objective.temperature, objective.weight) == (3.0, 0.5)


def test_balances_are_in_checkpoints() -> None:
    x = torch.ones(3, requires_grad=True)
    losses = {"a": x.sum(), "b": 5 * x.sum()}
    balance = GradientNormBalance(["a", "b"], decay=0.5)
    total = balance(losses, [x])
    # Both pull with the mean of the norms, 3 times that of a.
    torch.testing.assert_close(total.item(), 2 * 3 * 3.0)
    copy = GradientNormBalance(["a", "b"])
    copy.load_state_dict(balance.state_dict())
    assert copy.weights()["b"] == pytest.approx(0.6)
    uncertainty = UncertaintyBalance(["a", "b"])
    uncertainty(losses).backward()
    assert uncertainty.log_variance.grad is not None
    torch.testing.assert_close(uncertainty.log_variance.grad, torch.tensor([-3 + 0.5, -15 + 0.5]))
    assert list(uncertainty.state_dict()) == ["log_variance"]
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*\['a'\]"):
        uncertainty({"a": x.sum()})


@pytest.mark.parametrize("make", [HiddenState, AttentionMap])
def test_tokens_of_an_encoder_and_a_decoder_are_not_mixed(make: type[Objective]) -> None:
    modules = {"encoder.block.0": 4, "decoder.block.0": 4}
    info = ModelInfo(depth=1, width=4, num_heads=2, modules=modules, decoder="decoder")
    objective = make([("encoder.block.0", "encoder.block.0"), ("decoder.block.0", "decoder.block.0")])
    with pytest.raises(ValueError, match=f"`layers` of objective `{objective.name}`.*got both"):
        objective.bind(info, info)
    with pytest.raises(ValueError, match=r"near it are \['decoder.block.0'\]|near it are \['decoder.block.0', "):
        make([("decoder.block.9", "decoder.block.0")]).bind(info, info)
