"""The teacher's weights in a smaller model: whole layers, and of each weight the entries that stay."""

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_distill.functional.tensors import fill_
from lightning_distill.students.axes import Axis, Unit, kind_of, units
from lightning_distill.students.depth import Pairs
from lightning_distill.students.sizes import build, changed_axes, inputs


@dataclass
class Carry:
    """Copies the teacher's weights into a student, slice by slice.

    Args:
        teacher: The model to copy from.
        student: The model to fill.
        config: The teacher's config at the student's depth.
        pairs: Which layer of the teacher each of the student's is.
        names: The student's parameters to fill; None: all.
    """

    teacher: Any
    student: Any
    config: Any
    pairs: Pairs
    names: Collection[str] | None = None

    @torch.no_grad()
    def run(self) -> list[str]:
        """Copy, and give the names of the parameters that were filled."""
        source = dict(self.teacher.named_parameters(remove_duplicate=False))
        own = dict(self.student.named_parameters(remove_duplicate=False))
        # What a class does not save, it computes for its own size (Marian's positions): a folder would hold another.
        computed = set(getattr(self.student, "_keys_to_ignore_on_save", None) or ())
        own = {name: parameter for name, parameter in own.items() if name not in computed}
        names = {name: found for name in own if (found := self._source(name, source)) is not None}
        if missing := sorted(own.keys() - names.keys()):
            raise ValueError(
                "Expected the student to have parameters that its teacher has, too, but got "
                f"{missing[0]!r}, which a `{type(self.teacher).__name__}` of this size needs. Pass `init='random'`, or "
                "another `width` or `num_layers`."
            )
        self._warn(names, source)
        weights = {name: source[found] for name, found in names.items()}
        kept = self._kept(weights)
        filled = []
        for name, target in self.student.named_parameters():
            if name in names and (self.names is None or name in self.names):
                weight = weights[name]
                for axis in range(weight.ndim):
                    if (name, axis) in kept:
                        weight = weight.index_select(axis, kept[name, axis].to(weight.device))
                fill_(target, weight * factor if (factor := self._factor(name, names[name])) != 1 else weight)
                # The mark that `from_pretrained` leaves on what it has loaded: this is not new either.
                target._is_hf_initialized = True
                filled.append(name)
        return filled

    def _source(self, name: str, source: dict[str, Any]) -> str | None:
        """The teacher's parameter that one of the student is made of."""
        for path, pairs in self.pairs.items():
            if found := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
                of_layer = f"{path}.{pairs[int(found[1])]}.{name[found.end() :]}"
                # What only the first layer of a stack has (T5's relative positions) is the stack's.
                return of_layer if of_layer in source else name if name in source else None
        return name if name in source else None

    def _warn(self, names: dict[str, str], source: dict[str, Any]) -> None:
        """Say what of a layer has no place where it went: ModernBERT's first layer has no norm before its attention."""
        used = set(names.values())
        for path, pairs in self.pairs.items():
            for layer, of_teacher in pairs.items():
                prefix = f"{path}.{of_teacher}."
                lost = {name.removeprefix(prefix) for name in source.keys() - used if name.startswith(prefix)}
                if lost and any(name.startswith(f"{path}.{layer}.") for name in names):
                    which = "first layer" if layer == 0 else f"layer {layer}"
                    what = ", ".join(sorted({f"`{name.rpartition('.')[0]}`" for name in lost}))
                    warnings.warn(
                        f"The student's {which} is the teacher's layer {of_teacher} without its {what}, which the "
                        f"{which} of a {type(self.teacher).__name__} lacks. Pass `layers='skip'` or `layers='first'` "
                        "to begin with layer 0.",
                        stacklevel=4,
                    )

    def _factor(self, name: str, source: str) -> float:
        """By what an embedding grows that its class multiplies by a root of the width, where no head shares it."""
        both = (self.teacher, source), (self.student, name)
        scales = [
            float(getattr(model.get_submodule(path.rpartition(".")[0]), "embed_scale", 1.0)) for model, path in both
        ]
        if scales[0] == scales[1] or getattr(self.config.get_text_config(), "tie_word_embeddings", False):
            return 1.0
        return scales[0] / scales[1]

    def _kept(self, weights: dict[str, Tensor]) -> dict[Axis, Tensor]:
        """For each axis that is shorter in the student, the indices that stay, in order."""
        own = dict(self.student.named_parameters(remove_duplicate=False))
        if all(weights[name].shape == own[name].shape for name in weights):
            return {}
        twin = build(type(self.teacher), self.config)
        axes = changed_axes(dict(twin.named_parameters()), own)
        kinds: dict[Any, list[Unit]] = {}
        for unit in units(twin, axes, inputs(twin)):
            kinds.setdefault(kind_of(unit), []).append(unit)
        scores = {axis: _score(weights[axis[0]], axis[1]) for axis in axes if axis[0] in weights}
        kept: dict[Axis, list[Tensor]] = {}
        for kind, alike in kinds.items():
            count = _how_many(kind, len(alike), axes, own)
            for axis, indices in _largest(alike, count, scores).items():
                kept.setdefault(axis, []).append(indices)
        return {axis: torch.cat(indices).sort().values for axis, indices in kept.items()}


def _how_many(kind: Any, number: int, axes: dict[Axis, int], own: dict[str, Any]) -> int:
    """How many units of a kind a student has, by the axes that they are of."""
    counts = {number * own[name].shape[axis] / axes[name, axis] for (name, axis), _ in kind}
    count = min(counts)
    if len(counts) > 1 or not count.is_integer():
        names = sorted({name for (name, _), _ in kind})
        raise ValueError(
            f"Expected argument `student` to keep its {number} heads or neurons whole, but got {sorted(counts)} of "
            f"them in {names[:3]}. `student_from_teacher` makes a student that fits."
        )
    return int(count)


def _score(weight: Tensor, axis: int) -> Tensor:
    """Mean square of a weight at each index of an axis."""
    rest = [other for other in range(weight.ndim) if other != axis]
    squares = weight.float().square()
    return (squares.mean(rest) if rest else squares).cpu()


def _largest(alike: list[Unit], count: int, scores: dict[Axis, Tensor]) -> dict[Axis, Tensor]:
    """The indices of the units whose weights, all that read or write them, have the largest mean squares together."""
    indices = {axis: torch.tensor([unit[axis] for unit in alike]) for axis in alike[0]}
    total = sum(scores[axis][places].sum(1) for axis, places in indices.items() if axis in scores)
    assert isinstance(total, Tensor)
    # Stable, so that equal scores keep the leading ones, on every machine.
    best = total.sort(descending=True, stable=True).indices[:count]
    return {axis: places[best].flatten() for axis, places in indices.items()}
