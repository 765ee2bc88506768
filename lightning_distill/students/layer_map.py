"""Which student layer learns from which teacher layer."""

from collections.abc import Callable, Sequence
from typing import Any

#: The maps that have a name.
LAYER_MAPS = ("uniform", "last", "first", "skip", "every_other")

Layers = str | Sequence[int] | Sequence[tuple[int, int]]


def layer_map(layers: Layers, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    r"""Pair the layers of a student with layers of its teacher.

    With :math:`S` student and :math:`T` teacher layers, student layer :math:`i` is paired with teacher layer

    - ``"uniform"``: :math:`\lfloor (i + 1) T / S \rfloor - 1`, evenly spaced and ending at the last layer (TinyBERT);
    - ``"last"``: :math:`T - S + i`, the last ones;
    - ``"first"``: :math:`i`, the first ones;
    - ``"skip"``: :math:`i (T - 1) / (S - 1)`, rounded: evenly spaced from the first to the last layer, which for 12
      to 6 are the layers DistilBERT was initialised from;
    - ``"every_other"``: :math:`2 i`.

    Args:
        layers: A name; or one teacher layer per student layer; or explicit ``(student, teacher)`` pairs, in which a
            student layer may be absent. Layers count from 0.
        student_depth: Number of student layers.
        teacher_depth: Number of teacher layers.

    Returns:
        Pairs ``(student layer, teacher layer)``, both from 0.

    Raises:
        ValueError: If the map has no such name, names a layer that a model does not have, names a pair twice, or
            needs more layers than there are; both depths are in the message.

    Example:
        >>> from lightning_distill.students.layer_map import layer_map
        >>> layer_map("uniform", 3, 6)
        [(0, 1), (1, 3), (2, 5)]
        >>> layer_map("skip", 6, 12)
        [(0, 0), (1, 2), (2, 4), (3, 7), (4, 9), (5, 11)]
        >>> layer_map([(1, 5)], 3, 6)
        [(1, 5)]

    Source: Jiao et al., "TinyBERT", 2020 (uniform); Sun et al., "Patient Knowledge Distillation", 2019 (last; its
    "skip" is "uniform" without the last pair); Sanh et al., "DistilBERT", 2019 (skip).
    """
    depths = f"a student of {student_depth} and a teacher of {teacher_depth} layers"
    if isinstance(layers, str):
        return _named(layers, student_depth, teacher_depth, depths)

    items: list[Any] = list(layers)
    if all(isinstance(item, int) for item in items):
        if len(items) != student_depth:
            raise ValueError(
                f"Expected argument `layers` to name a teacher layer per student layer, but got {items} for {depths}. "
                "Name pairs (student, teacher) to leave layers out."
            )
        pairs = list(enumerate(items))
    else:
        pairs = [_pair(item, items) for item in items]
    if not pairs or len(set(pairs)) < len(pairs):
        raise ValueError(f"Expected argument `layers` to name at least one pair, each once, but got {items}.")
    for student_layer, teacher_layer in pairs:
        if not (0 <= student_layer < student_depth and 0 <= teacher_layer < teacher_depth):
            raise ValueError(
                f"Expected argument `layers` to name layers that exist, but got {student_layer, teacher_layer} for "
                f"{depths}. Layers count from 0."
            )
    return pairs


def _named(name: str, student_depth: int, teacher_depth: int, depths: str) -> list[tuple[int, int]]:
    if name not in LAYER_MAPS:
        raise ValueError(
            f"Expected argument `layers` to be one of {LAYER_MAPS}, a list of teacher layers, or a list of pairs, but "
            f"got {name!r}."
        )
    needed = 2 * student_depth - 1 if name == "every_other" else student_depth
    if student_depth < 1 or teacher_depth < needed:
        raise ValueError(
            f"Expected argument `layers={name!r}` to find {needed} teacher layers, but got {depths}. Take a shallower "
            "student, another map, or explicit pairs."
        )
    last = teacher_depth - 1
    teacher_of: dict[str, Callable[[int], int]] = {
        "uniform": lambda layer: (layer + 1) * teacher_depth // student_depth - 1,
        "last": lambda layer: teacher_depth - student_depth + layer,
        "first": lambda layer: layer,
        "skip": lambda layer: int(layer * last / (student_depth - 1) + 0.5) if student_depth > 1 else last,
        "every_other": lambda layer: 2 * layer,
    }
    return [(layer, teacher_of[name](layer)) for layer in range(student_depth)]


def _pair(item: Any, items: list[Any]) -> tuple[int, int]:
    if isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(layer, int) for layer in item):
        return item[0], item[1]
    raise ValueError(f"Expected argument `layers` to hold layers, or pairs of layers, but got {item!r} in {items}.")
