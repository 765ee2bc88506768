"""Which layers a student has: how many in each stack, which of the teacher's, and what its config says of each."""

import copy
import math
from dataclasses import replace
from typing import Any

from lightning_distill.students.layer_map import Layers, layer_map
from lightning_distill.students.sizes import (
    Depth,
    Field,
    Size,
    build,
    field_of,
    group_of,
    in_list,
    scaled,
    width_steps,
    widths,
    with_fields,
)

Pairs = dict[str, dict[int, int]]
"""By the path of a stack: the teacher's layer of each of the student's."""


def shorter(found: list[Depth], num_layers: int | None, num_decoder_layers: int | None) -> dict[Field, Size]:
    """What each field of depth says of a student; stages keep their shares of the layers.

    Example:
        >>> shorter([Depth(("", "depths"), [2, 2, 6, 2])], 6, None)
        {('', 'depths'): [1, 1, 3, 1]}
    """
    asked = {False: num_layers, True: num_decoder_layers}
    return {depth.field: _shared_out(depth.layers, asked[depth.of_decoder] or depth.total) for depth in found}


def half_depth(found: list[Depth]) -> dict[str, int]:
    """The arguments of a student of half the layers, at least one in each stage.

    Example:
        >>> half_depth([Depth(("", "num_layers"), 6), Depth(("", "num_decoder_layers"), 4, of_decoder=True)])
        {'num_layers': 3, 'num_decoder_layers': 2}
    """
    half: dict[str, int] = {}
    for depth in found:
        name = "num_decoder_layers" if depth.of_decoder else "num_layers"
        total = max(depth.total // 2, len(in_list(depth.layers)))
        half[name] = min(total, half.get(name, total))
    return half


def _shared_out(layers: Size, total: int) -> Size:
    if isinstance(layers, int):
        return total
    if total < len(layers):
        raise ValueError(
            f"Expected argument `num_layers` to be at least {len(layers)}, one for each stage, but got {total}."
        )
    stages = [1] * len(layers)
    while sum(stages) < total:
        # The stage that is furthest below its share, the first of equals.
        behind = [stage / of_teacher for stage, of_teacher in zip(stages, layers, strict=True)]
        stages[behind.index(min(behind))] += 1
    return stages


def of_depth(config: Any, found: list[Depth], chosen: dict[Field, Size], layers: Layers) -> tuple[Any, Pairs]:
    """The teacher's config with other depths, and which layer each one is.

    Args:
        config: The teacher's config.
        found: Its fields of depth.
        chosen: What they say of the student.
        layers: See :func:`lightning_distill.students.layer_map.layer_map`.
    """
    values: dict[Field, Any] = {}
    pairs: Pairs = {}
    for depth in found:
        small = chosen[depth.field]
        for number, (mine, theirs) in enumerate(zip(in_list(small), in_list(depth.layers), strict=True)):
            # A list names the layers of the stack that is made shorter.
            whole = small == depth.layers and len(found) > 1
            of_stack = _pairs("first" if whole else layers, mine, theirs)
            if depth.groups is not None:
                of_groups = _of_groups(of_stack, theirs, field_of(config, depth.groups))
                pairs[depth.stacks[0]], values[depth.groups] = of_groups, len(of_groups)
                continue
            for path in depth.stacks[number:] if isinstance(small, int) else depth.stacks[number : number + 1]:
                pairs[path] = of_stack
            if isinstance(small, int):
                values |= _of_each_layer(config, depth, of_stack)
        values[depth.field] = small
    return with_fields(config, values), pairs


def _of_groups(pairs: dict[int, int], teacher_depth: int, teacher_groups: int) -> dict[int, int]:
    """Which of the teacher's groups each of the student's is: the fewest by which each layer has its weights.

    Example:
        >>> _of_groups({0: 5, 1: 11}, 12, 1), _of_groups({0: 5, 1: 11}, 12, 4)
        ({0: 0}, {0: 1, 1: 3})
    """
    for groups in range(1, len(pairs) + 1):
        found: dict[int, set[int]] = {}
        for layer, source in pairs.items():
            group = group_of(source, teacher_depth, teacher_groups)
            found.setdefault(group_of(layer, len(pairs), groups), set()).add(group)
        if all(len(of_one) == 1 for of_one in found.values()):
            break
    return {group: of_one.pop() for group, of_one in found.items()}


def _of_each_layer(config: Any, depth: Depth, pairs: dict[int, int]) -> dict[Field, Any]:
    """What a config says of each layer (sliding or full attention) goes with the layer."""
    tower, values = depth.field[0], {}
    for name, value in vars(getattr(config, tower) if tower else config).items():
        if not isinstance(value, list) or "layer" not in name:
            continue
        if name == "mlp_only_layers":  # numbers of layers, where others have an entry a layer
            values[tower, name] = [layer for layer, source in pairs.items() if source in value]
        elif len(value) == depth.layers:
            values[tower, name] = [copy.copy(value[source]) for source in pairs.values()]
    return values


def _pairs(layers: Layers, depth: int, teacher_depth: int) -> dict[int, int]:
    pairs = dict(layer_map(layers, depth, teacher_depth))
    if len(pairs) < depth:
        raise ValueError(f"Expected argument `layers` to name a teacher layer per student layer, but got {layers}.")
    return pairs


def at_depth(found: list[Depth], chosen: dict[Field, Size]) -> list[Depth]:
    """The fields of depth as they are in a student."""
    return [replace(depth, layers=chosen[depth.field]) for depth in found]


def shape_for(teacher: Any, found: list[Depth], ratio: float) -> tuple[dict[Field, Size], float]:
    """Layers and width of the student whose size is nearest to the teacher's divided by the ratio.

    Raises:
        ValueError: If the ratio is not above 1, or the teacher cannot be made smaller.
    """
    if not 1 < ratio < math.inf:
        advice = f" For a student of {ratio} times the size pass {1 / ratio:.4g}." if 0 < ratio < 1 else ""
        raise ValueError(
            "Expected argument `compression_ratio` to be above 1 (parameters of the teacher / parameters of the "
            f"student), but got {ratio}.{advice}"
        )
    target = sum(parameter.numel() for parameter in teacher.parameters()) / ratio
    deepest = max(depth.total for depth in found)
    least = max(len(in_list(depth.layers)) for depth in found)
    sizes: dict[tuple[int, float], int] = {}
    fields = widths(type(teacher), teacher.config)
    steps = width_steps(fields)
    for width in (step / steps for step in range(steps, 0, -1)):
        for layers in range(least, deepest + 1):
            config, _ = of_depth(teacher.config, found, _share(found, layers / deepest), "uniform")
            model = build(type(teacher), with_fields(config, scaled(fields, width)))
            sizes[layers, width] = sum(parameter.numel() for parameter in model.parameters())
        if width == 1.0 and sizes[least, width] <= target:
            break
    sizes.pop((deepest, 1.0))
    if not sizes:
        raise ValueError(f"Expected a teacher that can be made smaller, but got one layer of one head ({ratio=}).")
    # Of equals the deepest: layers that share their weights (ALBERT) cost no parameters.
    layers, width = min(sizes, key=lambda shape: (abs(math.log(sizes[shape] / target)), -shape[0]))
    return _share(found, layers / deepest), width


def _share(found: list[Depth], share: float) -> dict[Field, Size]:
    return {
        depth.field: _shared_out(depth.layers, max(len(in_list(depth.layers)), round(share * depth.total)))
        for depth in found
    }
