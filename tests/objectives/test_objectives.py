"""What must be true of every objective, run over the registry."""

import copy
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from lightning_distill import objectives
from lightning_distill.objectives import Loss, Objective
from lightning_distill.signals.signals import Signals

from .registry import CASES, Case, changed, signals, tensors

every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def test_every_public_objective_is_in_the_registry() -> None:
    public = {kind for kind in vars(objectives).values() if isinstance(kind, type) and issubclass(kind, Objective)}
    assert {type(case.make()) for case in CASES} == public - {Objective, objectives.FeatureObjective}


def leaves(source: Signals, dtype: torch.dtype = torch.float64) -> Signals:
    """A copy whose tensors want a gradient."""
    return changed(source, lambda x: x.detach().to(dtype).clone().requires_grad_(), lambda mask: mask)


def constants(source: Signals, dtype: torch.dtype = torch.float64) -> Signals:
    return changed(source, lambda x: x.detach().to(dtype), lambda mask: mask)


def gradients(source: Signals) -> list[Tensor]:
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors(source)]


@every_case
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("rows", "tokens"), [(2, 3), (4, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_its_oracle(case: Case, masked: bool, rows: int, tokens: int, dtype: torch.dtype) -> None:
    width, heads = (9, 6) if case.any_width else (6, 2)
    student = signals(rows, tokens, seed=1, masked=masked)
    teacher = signals(rows, tokens, width=width, heads=heads, seed=2, masked=masked)
    own, reference = leaves(student, dtype), leaves(constants(student, dtype))
    teacher = constants(teacher, dtype)
    loss = case.bound(width, heads)(own, teacher).mean()
    oracle = case.oracle(reference, constants(teacher))
    assert loss.dtype == dtype
    precise = dtype == torch.float64
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-9 if precise else 1e-6, atol=1e-9 if precise else 1e-6)
    loss.backward()
    oracle.backward()
    for one, other in zip(gradients(own), gradients(reference), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-7 if precise else 1e-4, atol=1e-9 if precise else 2e-6)


@every_case
def test_what_counts_is_known_before_the_models_run(case: Case) -> None:
    width, heads = (9, 6) if case.any_width else (6, 2)
    student, teacher = signals(4, 6, seed=1), signals(4, 6, width=width, heads=heads, seed=2)
    objective = case.bound(width, heads)
    assert objective.counts_ahead
    ahead = objective.count(Signals(student.logits, student.labels, student.mask, student.token_mask), teacher)
    assert ahead is None or ahead == objective(student, teacher).count()


@every_case
def test_zero_and_no_gradient_where_student_equals_teacher(case: Case) -> None:
    if not case.zero_when_equal:
        pytest.skip("not defined: it is not 0 there")
    student = leaves(signals(seed=1))
    loss = case.bound()(student, constants(student)).mean()
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert max(gradient.abs().max().item() for gradient in gradients(student)) < 1e-12


@every_case
def test_gradcheck(case: Case) -> None:
    if case.has_constants:
        pytest.skip("a part of the value is a constant to the gradient, which is compared with the oracle's")
    student, teacher, objective = leaves(signals(seed=1)), signals(seed=2), case.bound()
    inputs = tensors(student)

    def values(*_: Tensor) -> Tensor:
        # The numerical side changes the tensors of `inputs` in place, which are those of the signals.
        return objective(student, teacher).sum()

    assert torch.autograd.gradcheck(values, inputs, fast_mode=True)


@every_case
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_signals_are_computed_in_float32(case: Case, autocast: bool) -> None:
    student, teacher = (constants(signals(seed=seed), torch.bfloat16) for seed in (1, 2))
    objective = case.bound()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = objective(student, teacher).mean()
    exact = objective(constants(student), constants(teacher)).mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=2e-6)


@every_case
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_a_fully_padded_row_changes_nothing(case: Case, garbage: float) -> None:
    student, teacher = signals(seed=1), signals(seed=2)

    def padded(source: Signals) -> Signals:
        def row(mask: Tensor) -> Tensor:
            return torch.cat([mask, torch.full_like(mask[:1], -100 if mask.dtype == torch.long else False)])

        return changed(source, lambda x: torch.cat([x, torch.full_like(x[:1], garbage)]), row)

    short, long = leaves(student), leaves(padded(student))
    objective = case.bound()
    one, other = objective(short, teacher), objective(long, padded(teacher))
    assert one.count() == other.count()
    torch.testing.assert_close(one.mean(), other.mean())
    one.mean().backward()
    other.mean().backward()
    for a, b in zip(gradients(short), gradients(long), strict=True):
        torch.testing.assert_close(a, b[:-1])
        assert not b[-1].any()


@every_case
def test_longer_padding_changes_nothing(case: Case) -> None:
    student, teacher = signals(seed=1), signals(seed=2)

    def longer(source: Signals) -> Signals:
        def along(x: Tensor, value: float) -> Tensor:
            shape = list(x.shape)
            axis = {2: 1, 3: 1, 4: 3 if x.dtype == torch.bool else 2}[x.ndim]
            shape[axis] = 3
            return torch.cat([x, x.new_full(shape, value)], axis)

        return changed(source, lambda x: along(x, 7.0), lambda x: along(x, -100 if x.dtype == torch.long else False))

    objective = case.bound()
    torch.testing.assert_close(objective(longer(student), longer(teacher)).mean(), objective(student, teacher).mean())


def part(source: Signals, rows: slice) -> Signals:
    return changed(source, lambda x: x[rows], lambda mask: mask[rows])


@every_case
def test_micro_batches_give_the_gradient_of_the_batch(case: Case) -> None:
    if case.batch_coupled:
        pytest.skip("the value of a row depends on its batch, as documented")
    whole, split, teacher = leaves(signals(5, seed=1)), leaves(signals(5, seed=1)), signals(5, seed=2)
    objective = case.bound()
    loss = objective(whole, teacher)
    loss.mean().backward()
    losses = [objective(part(split, rows), part(teacher, rows)) for rows in (slice(0, 1), slice(1, 3), slice(3, 5))]
    assert sum(loss.count() for loss in losses) == loss.count()
    for loss_ in losses:
        (loss_.sum() / loss.count()).backward()
    for one, other in zip(gradients(whole), gradients(split), strict=True):
        torch.testing.assert_close(one, other)


def _rank(rank: int, port: int, expected: dict[str, Tensor], scales: Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    student, teacher = signals(5, seed=1), signals(5, seed=2)
    rows = slice(0, 2) if rank == 0 else slice(2, 5)
    for case in CASES:
        if case.batch_coupled:
            continue
        scale = scales.clone().requires_grad_()
        loss = case.bound()(scaled(part(student, rows), scale), part(teacher, rows))
        count = loss.count().clone()
        dist.all_reduce(count)
        (loss.sum() / count).backward()
        assert scale.grad is not None
        dist.all_reduce(scale.grad)
        torch.testing.assert_close(scale.grad, expected[case.name], msg=lambda text, name=case.name: f"{name}: {text}")
    dist.destroy_process_group()


def scaled(source: Signals, scale: Tensor) -> Signals:
    """Signals that depend on parameters which every rank has a copy of."""
    return changed(source, lambda x: x * scale[0] + x.square() * scale[1], lambda mask: mask)


@pytest.mark.forks
def test_two_processes_give_the_gradient_of_one() -> None:
    student, teacher = signals(5, seed=1), signals(5, seed=2)
    scales = torch.tensor([0.9, 0.1], dtype=torch.float64)
    expected = {}
    for case in CASES:
        scale = scales.clone().requires_grad_()
        case.bound()(scaled(student, scale), teacher).mean().backward()
        expected[case.name] = scale.grad
    port = 20000 + torch.randint(0, 20000, (), generator=torch.Generator().manual_seed(id(expected) % 2**31)).item()
    mp.start_processes(_rank, (port, expected, scales), nprocs=2, start_method="fork")


ON_LOGITS = ("hard_label", "decoupled", "top_k", "universal_logit", "correlation", "curriculum")
LOGIT_CASES = [case for case in CASES if "_at_" in case.name or case.name in ON_LOGITS]


@pytest.mark.parametrize("case", LOGIT_CASES, ids=[case.name for case in LOGIT_CASES])
@pytest.mark.parametrize("change", ["huge", "opposite", "excluded"])
def test_extreme_logits_stay_finite(case: Case, change: str) -> None:
    student, teacher = constants(signals(seed=1), torch.float32), constants(signals(seed=2), torch.float32)
    if change == "huge":
        student.logits, teacher.logits = (x.logits.sign() * 1e4 for x in (student, teacher))
    elif change == "opposite":
        student.logits = 1e4 * torch.nn.functional.one_hot(torch.zeros(3, 5, dtype=torch.long), 7).float()
        teacher.logits = student.logits.flip(-1)
    else:
        # A class that both models exclude, and that no label names.
        assert student.labels is not None
        student.labels = student.labels.masked_fill(student.labels == 3, 4)
        excluded = torch.arange(7) == 3
        student.logits, teacher.logits = (x.logits.masked_fill(excluded, -torch.inf) for x in (student, teacher))
    if case.name == "hard_label" and change == "excluded":
        pytest.skip("label smoothing asks for mass on the excluded class: the loss is infinite by definition")
    student = leaves(student, torch.float32)
    loss = case.bound()(student, teacher).mean()
    loss.backward()
    assert loss.isfinite()
    assert student.logits.grad is not None
    assert student.logits.grad.isfinite().all()


@every_case
def test_can_be_copied_and_says_its_name(case: Case) -> None:
    objective = case.bound()
    clone = copy.deepcopy(objective)
    student, teacher = signals(seed=1), signals(seed=2)
    assert torch.equal(clone(student, teacher).values, objective(student, teacher).values)
    assert objective.name.isidentifier()
    assert objective.name in repr(objective)


def test_values_of_no_item_at_all() -> None:
    nothing = changed(signals(seed=1), lambda x: x, lambda x: torch.full_like(x, -100 if x.dtype == torch.long else 0))
    run: Callable[[Case], Loss] = lambda case: case.bound()(leaves(nothing), nothing)  # noqa: E731
    for case in CASES:
        loss = run(case)
        assert loss.count() == 0, case.name
        assert loss.mean() == 0, case.name
        loss.mean().backward()


@pytest.mark.parametrize("kind", sorted({type(case.make()) for case in CASES}, key=lambda kind: kind.__name__))
def test_yaml_and_the_command_line_reach_every_argument(kind: type[Objective]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)
    path = f"lightning_distill.objectives.{kind.__name__}"
    schedule = {"class_path": "lightning_distill.objectives.LinearSchedule", "init_args": {"start": 0.0, "end": 2.0}}
    arguments = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    arguments |= {"weight": schedule, "name": "mine"}
    config = {"objective": {"class_path": path, "init_args": _plain(arguments)}}
    of_yaml = parser.instantiate(parser.parse_string(yaml.safe_dump(config))).objective
    of_yaml.set_progress(0.5)
    assert (type(of_yaml), of_yaml.name, of_yaml.weight) == (kind, "mine", 1.0)

    flags = [
        f"--objective.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in _plain(arguments | {"weight": 0.25}).items()
    ]
    of_flags = parser.instantiate(parser.parse_args([f"--objective={path}", *flags])).objective
    assert (type(of_flags), of_flags.name, of_flags.weight) == (kind, "mine", 0.25)


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
