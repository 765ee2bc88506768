import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_distill.students.layer_map import LAYER_MAPS, layer_map


def teachers(name: str, student_depth: int, teacher_depth: int) -> list[int]:
    return [teacher for _, teacher in layer_map(name, student_depth, teacher_depth)]


def test_the_maps_of_the_papers() -> None:
    # TinyBERT's g(m) = 3 m, with layers from 1.
    assert [t + 1 for t in teachers("uniform", 4, 12)] == [3, 6, 9, 12]
    # The layers of DistilBERT's initialisation.
    assert teachers("skip", 6, 12) == [0, 2, 4, 7, 9, 11]
    # PKD-last of a 6-layer student, with layers from 1.
    assert [t + 1 for t in teachers("last", 5, 11)] == [7, 8, 9, 10, 11]
    assert teachers("first", 3, 6) == [0, 1, 2]
    assert teachers("every_other", 3, 6) == [0, 2, 4]
    assert teachers("skip", 1, 6) == [5]


@given(st.sampled_from(LAYER_MAPS), st.integers(1, 40), st.integers(1, 80))
def test_a_named_map_is_increasing_and_in_range(name: str, student_depth: int, teacher_depth: int) -> None:
    if teacher_depth < (2 * student_depth - 1 if name == "every_other" else student_depth):
        with pytest.raises(ValueError, match=rf"student of {student_depth} .* teacher of {teacher_depth} layers"):
            layer_map(name, student_depth, teacher_depth)
        return
    pairs = layer_map(name, student_depth, teacher_depth)
    assert [student for student, _ in pairs] == list(range(student_depth))
    layers = [teacher for _, teacher in pairs]
    assert layers == sorted(set(layers))
    assert layers[0] >= 0
    assert layers[-1] < teacher_depth
    if name in ("uniform", "last", "skip"):
        assert layers[-1] == teacher_depth - 1


def test_lists_and_pairs() -> None:
    assert layer_map([1, 3], 2, 4) == [(0, 1), (1, 3)]
    assert layer_map([(1, 3), (1, 0)], 2, 4) == [(1, 3), (1, 0)]
    # YAML has no tuples.
    assert layer_map([[1, 3]], 2, 4) == [(1, 3)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("middle", "one of .*'uniform'"),
        ([1], r"teacher layer per student layer.*student of 2 and a teacher of 4"),
        ([0, 4], r"\(1, 4\) for a student of 2 and a teacher of 4"),
        ([(2, 0)], r"\(2, 0\) for a student of 2"),
        ([(0, -1)], "count from 0"),
        ([(0, 1), (0, 1)], "each once"),
        ([], "teacher layer per student layer"),
        ([(0, 1, 2)], r"pairs of layers, but got \(0, 1, 2\)"),
    ],
)
def test_an_impossible_map_is_refused(layers: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_map(layers, 2, 4)  # type: ignore[arg-type]
