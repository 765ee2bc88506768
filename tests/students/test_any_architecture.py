"""Students of every architecture: the channels, heads and neurons that are found are those of the function."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distill import student_from_teacher
from lightning_distill.students.axes import kind_of, units
from lightning_distill.students.sizes import build as on_meta
from lightning_distill.students.sizes import changed_axes, inputs
from tests.students.architectures import CASES, answer, build

# A model whose first layer differs is allowed to say so; the test of that message is in test_student.
pytestmark = pytest.mark.filterwarnings("ignore:The student's first layer is the teacher's layer")


def shuffled(teacher: Any) -> int:
    """Put what a student of half the width has half of into another order, kind by kind; how many kinds there are."""
    small = student_from_teacher(teacher, width=0.5, init="random")
    twin = on_meta(type(teacher), teacher.config)
    axes = changed_axes(dict(twin.named_parameters()), dict(small.named_parameters(remove_duplicate=False)))
    kinds: dict[Any, list[Any]] = {}
    for unit in units(twin, axes, inputs(twin)):
        kinds.setdefault(kind_of(unit), []).append(unit)
    parameters = dict(teacher.named_parameters())
    order = {axis: list(range(parameters[axis[0]].shape[axis[1]])) for axis in axes if axis[0] in parameters}
    generator = torch.Generator().manual_seed(3)
    for alike in kinds.values():
        for here, there in enumerate(torch.randperm(len(alike), generator=generator).tolist()):
            for axis in alike[here].keys() & order.keys():
                for i, j in zip(alike[here][axis], alike[there][axis], strict=True):
                    order[axis][i] = j
    with torch.no_grad():
        for (name, axis), indices in order.items():
            parameters[name].copy_(parameters[name].index_select(axis, torch.tensor(indices)))
    return len(kinds)


@pytest.mark.parametrize("name", CASES)
def test_units_in_another_order_are_the_same_function(name: str) -> None:
    teacher = build(name)
    with torch.no_grad():
        expected = answer(teacher)
        assert shuffled(teacher) > 4
        difference = (answer(teacher) - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 1e-5, "sums in another order differ in their last bits, and in no other"


@pytest.mark.parametrize("name", CASES)
def test_a_student_is_smaller_learns_and_is_loaded_again(name: str, tmp_path: Path) -> None:
    teacher = build(name)
    sizes = [sum(parameter.numel() for parameter in teacher.parameters())]
    for smaller in ({"num_layers": 2}, {"width": 0.5}, {"num_layers": 2, "width": 0.5}):
        student = student_from_teacher(teacher, **smaller)
        sizes.append(sum(parameter.numel() for parameter in student.parameters()))
    assert sizes[3] < min(sizes[1:3]) < max(sizes[1:3]) < sizes[0]
    answer(student).square().mean().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())
    student.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        again = answer(type(student).from_pretrained(tmp_path).eval())
        torch.testing.assert_close(again, answer(student), rtol=0, atol=0)
