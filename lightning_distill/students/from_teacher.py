"""A smaller model of the same kind, made from a teacher: fewer layers, narrower ones, weights carried over."""

import copy
import math
import os
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_distill.arguments import one_of, typed
from lightning_distill.functional.tensors import fill_
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.models.wrapped import inside
from lightning_distill.signals.description import find_layers
from lightning_distill.students.config import by_hand
from lightning_distill.students.layer_map import Layers, layer_map

# Axes of a weight that grow with the width, by the end of its name within a layer: h is the residual stream, q the
# query heads, k the key and value heads, i the neurons of the feed-forward; "qqq" and "ii" are blocks side by side.
# Axes that are not named here are the residual stream where they differ in size, and copied whole where they do not.
_BERT = (
    (r"attention\.self\.(query|key|value)\.", ("q", "h")),
    (r"attention\.output\.dense\.", ("h", "q")),
    (r"intermediate\.dense\.", ("i", "h")),
    (r"^output\.dense\.", ("h", "i")),
)
_LLAMA = (
    (r"self_attn\.q_proj\.", ("q", "h")),
    (r"self_attn\.[kv]_proj\.", ("k", "h")),
    (r"self_attn\.o_proj\.", ("h", "q")),
    (r"mlp\.(gate|up)_proj\.", ("i", "h")),
    (r"mlp\.down_proj\.", ("h", "i")),
)
_AXES: dict[str, tuple[tuple[str, tuple[str, str]], ...]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    "distilbert": (
        (r"attention\.[qkv]_lin\.", ("q", "h")),
        (r"attention\.out_lin\.", ("h", "q")),
        (r"ffn\.lin1\.", ("i", "h")),
        (r"ffn\.lin2\.", ("h", "i")),
    ),
    "modernbert": (
        (r"attn\.Wqkv\.", ("qqq", "h")),
        (r"attn\.Wo\.", ("h", "q")),
        (r"mlp\.Wi\.", ("ii", "h")),
        (r"mlp\.Wo\.", ("h", "i")),
    ),
    # GPT-2 keeps its weights transposed, [in, out]; a bias belongs to the last axis.
    "gpt2": (
        (r"attn\.c_attn\.", ("h", "qqq")),
        (r"attn\.c_proj\.", ("q", "h")),
        (r"mlp\.c_fc\.", ("h", "i")),
        (r"mlp\.c_proj\.", ("i", "h")),
    ),
    "llama": _LLAMA,
    "qwen3": _LLAMA,
}
_INTERMEDIATE = {"distilbert": "hidden_dim", "gpt2": "n_inner"}


@typed
def student_from_teacher(
    teacher: nn.Module | str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    width: float | None = None,
    compression_ratio: float | None = None,
    layers: Layers = "uniform",
    init: Literal["teacher", "random"] = "teacher",
) -> nn.Module:
    """Make a student of the teacher's class with fewer layers, narrower layers, or both.

    Depth: whole layers are copied, chosen by a layer map. Width: hidden size, feed-forward size and heads shrink
    together and the size of a head stays, so that heads are kept or left out whole. What is kept is what weighs most:
    of the residual stream the channels, of each layer the heads and the feed-forward neurons, with the largest mean
    square of all weights that read or write them. One choice of channels holds through the whole model.

    Known are BERT, DistilBERT, RoBERTa, ELECTRA, ModernBERT, GPT-2, Llama and Qwen3, with any head of transformers.

    Args:
        teacher: The model, a folder or a hub id.
        num_layers: Layers of the student, at most the teacher's; None: all of them.
        width: Share of the teacher's width, in (0, 1]; None: all of it.
        compression_ratio: Parameters of the teacher divided by parameters of the student, above 1, instead of the two
            above. Layers go first; width goes too where one layer is still too many. The nearest that can be had.
        layers: Which of the teacher's layers, see :func:`lightning_distill.students.layer_map.layer_map`.
        init: ``"teacher"`` carries the teacher's weights over; ``"random"`` leaves the architecture's own
            initialisation.

    Returns:
        The student, in train mode, with no tensor in common with the teacher.

    Raises:
        ValueError: If an argument is out of its range, a width leaves a fraction of a head or a neuron (the nearest
            width that does not is named), or the architecture is not known.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from lightning_distill import student_from_teacher
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
        >>> student = student_from_teacher(BertForSequenceClassification(config), num_layers=2, width=0.5)
        >>> student.config.num_hidden_layers, student.config.hidden_size, student.config.num_attention_heads
        (2, 16, 2)

    Source: Sanh et al., "DistilBERT", 2019 (depth); Michel et al., "Are Sixteen Heads Really Better than One?", 2019,
    and Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", 2024 (width).
    """
    model: Any = load_pretrained(teacher, "teacher")
    _check_known(model)
    one_of("init", init, ("teacher", "random"))
    depth = model.config.num_hidden_layers
    if compression_ratio is not None:
        if num_layers is not None or width is not None:
            raise ValueError(
                "Expected argument `compression_ratio` to stand alone, because it chooses layers and width, but got "
                f"num_layers={num_layers} and width={width} beside it."
            )
        num_layers, width = _shape_for(model, compression_ratio)
    num_layers, width = depth if num_layers is None else num_layers, 1.0 if width is None else width
    if not 1 <= num_layers <= depth:
        raise ValueError(
            f"Expected argument `num_layers` to be from 1 to {depth}, the teacher's depth, but got {num_layers}."
        )
    pairs = _pairs(layers, num_layers, depth)
    student: nn.Module = type(model)(_config(model, num_layers, width, pairs))
    if init == "teacher":
        _Carry(model, student, pairs).run()
    return student.train()


def copy_from_teacher(
    student: nn.Module, teacher: nn.Module, layers: Layers = "uniform", names: Collection[str] | None = None
) -> list[str]:
    """Carry the teacher's weights over into a student there is, as :func:`student_from_teacher` does.

    Args:
        student: A model of the teacher's class, of the size of one that :func:`student_from_teacher` makes.
        teacher: The model to copy from.
        layers: See there.
        names: The student's parameters to fill; None: all.

    Returns:
        The names of the student's parameters that were filled.

    Raises:
        ValueError: If the student is of another class or size, or the architecture is not known.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
        >>> teacher = BertModel(BertConfig(num_hidden_layers=4, **small))
        >>> student = BertModel(BertConfig(num_hidden_layers=2, **small))
        >>> len(copy_from_teacher(student, teacher, "last")) == len(list(student.parameters()))
        True
        >>> torch.equal(student.encoder.layer[1].output.dense.weight, teacher.encoder.layer[3].output.dense.weight)
        True
    """
    big: Any = teacher
    small: Any = student
    _check_known(big)
    if type(small) is not type(big):
        raise ValueError(
            f"Expected argument `student` to be a `{type(big).__name__}` as its teacher is, but got a "
            f"`{type(small).__name__}`."
        )
    depth = small.config.num_hidden_layers
    pairs = _pairs(layers, depth, big.config.num_hidden_layers)
    with torch.device("meta"):
        like = type(big)(_config(big, depth, small.config.hidden_size / big.config.hidden_size, pairs))
    wanted, got = (
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} for model in (like, small)
    )
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise ValueError(
                f"Expected argument `student` to have the sizes of a student of this teacher, {wanted.get(name)} for "
                f"{name!r}, but got {got.get(name)}; `student_from_teacher` makes one that fits."
            )
    return _Carry(big, small, pairs, names).run()


def _pairs(layers: Layers, depth: int, teacher_depth: int) -> dict[int, int]:
    pairs = dict(layer_map(layers, depth, teacher_depth))
    if len(pairs) < depth:
        raise ValueError(f"Expected argument `layers` to name a teacher layer per student layer, but got {layers}.")
    return pairs


def _check_known(teacher: Any) -> None:
    if inside(teacher) is not teacher:
        raise ValueError(
            f"Expected argument `teacher` to be a plain model, but got a `{type(teacher).__name__}`. Merge the adapter "
            "into its base first: `teacher.merge_and_unload()`."
        )
    kind = getattr(getattr(teacher, "config", None), "model_type", None)
    if kind not in _AXES:
        raise ValueError(
            f"Expected argument `teacher` to be one of {list(_AXES)}, but got a `{type(teacher).__name__}`"
            f"{'' if kind is None else f' ({kind})'}. Make the student by hand"
            + (", smaller," if kind is None else f", for example `{by_hand(teacher)}`,")
            + " and pass it: `DistillationModule(teacher, student)`."
        )


def _config(teacher: Any, num_layers: int, width: float, pairs: dict[int, int]) -> Any:
    config = copy.deepcopy(teacher.config)
    if width != 1.0:
        for field, value in _sizes(teacher.config, width).items():
            setattr(config, field, value)
    # What a config says of each layer (sliding or full attention) goes with the layer.
    types = vars(config).get("layer_types")
    if isinstance(types, list) and len(types) == config.num_hidden_layers:
        config.layer_types = [types[pairs[layer]] for layer in range(num_layers)]
    config.num_hidden_layers = num_layers
    return config


def _sizes(config: Any, width: float) -> dict[str, int]:
    """The config's fields that shrink with the width, at that width."""
    if not 0 < width <= 1:
        raise ValueError(f"Expected argument `width` to be in (0, 1], but got {width}.")
    intermediate = _INTERMEDIATE.get(config.model_type, "intermediate_size")
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "hidden_size": config.hidden_size,
        intermediate: getattr(config, intermediate) or 4 * config.hidden_size,
    }
    if getattr(config, "num_key_value_heads", None):
        sizes["num_key_value_heads"] = config.num_key_value_heads
    if getattr(config, "embedding_size", None) == config.hidden_size:
        sizes["embedding_size"] = config.hidden_size
    # Every size must stay whole, so the width is a multiple of one over their greatest common divisor.
    steps = math.gcd(*sizes.values())
    nearest = min(max(1, round(width * steps)), steps)
    if abs(width * steps - nearest) > 1e-6:
        raise ValueError(
            f"Expected argument `width` to keep heads and neurons whole (a multiple of 1/{steps} of the teacher's "
            f"{sizes}), but got {width}. The nearest is {nearest}/{steps} = {nearest / steps:.4g}."
        )
    return {field: size * nearest // steps for field, size in sizes.items()}


def _shape_for(teacher: Any, ratio: float) -> tuple[int, float]:
    """Layers and width of the student whose size is nearest to the teacher's divided by the ratio."""
    if not 1 < ratio < math.inf:
        advice = f" For a student of {ratio} times the size pass {1 / ratio:.4g}." if 0 < ratio < 1 else ""
        raise ValueError(
            "Expected argument `compression_ratio` to be above 1 (parameters of the teacher / parameters of the "
            f"student), but got {ratio}.{advice}"
        )
    depth, target = teacher.config.num_hidden_layers, _count(teacher) / ratio

    def size(num_layers: int, width: float) -> int:
        with torch.device("meta"):
            pairs = dict(layer_map("first", num_layers, depth))
            return _count(type(teacher)(_config(teacher, num_layers, width, pairs)))

    steps = math.gcd(*_sizes(teacher.config, 1.0).values())
    sizes: dict[tuple[int, float], int] = {}
    for width in (step / steps for step in range(steps, 0, -1)):
        # Layers of one width have one size, so two models tell the size of all.
        least = size(1, width)
        per_layer = size(2, width) - least if depth > 1 else 0
        sizes |= {(num_layers, width): least + (num_layers - 1) * per_layer for num_layers in range(1, depth + 1)}
        if width == 1.0 and least <= target:
            break
    sizes.pop((depth, 1.0))
    if not sizes:
        raise ValueError(f"Expected a teacher that can be made smaller, but got one layer of one head ({ratio=}).")
    return min(sizes, key=lambda shape: abs(math.log(sizes[shape] / target)))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass
class _Carry:
    """Copies the teacher's weights into a student, slice by slice."""

    teacher: Any
    student: Any
    pairs: dict[int, int]
    names: Collection[str] | None = None

    @torch.no_grad()
    def run(self) -> list[str]:
        config = self.teacher.config
        self.axes = _AXES[config.model_type]
        layers = find_layers(self.teacher)
        self.stack = next(path for path, module in self.teacher.named_modules() if module is layers)
        self.source = dict(self.teacher.named_parameters(remove_duplicate=False))
        self.kept = self._kept()
        filled = []
        for name, target in self.student.named_parameters():
            layer, rest = self._split(name)
            source = name if layer is None else f"{self.stack}.{self.pairs[layer]}.{rest}"
            if source in self.source and (self.names is None or name in self.names):
                fill_(target, self._sliced(source, target))
                # The mark that `from_pretrained` leaves on what it has loaded: this is not new either.
                target._is_hf_initialized = True
                filled.append(name)
        # ModernBERT's first layer has no norm before its attention, so the norm of another layer has no place there.
        if config.model_type == "modernbert" and self.pairs[0] != 0:
            warnings.warn(
                f"The student's first layer is the teacher's layer {self.pairs[0]} without its `attn_norm`, which the "
                "first layer of a ModernBERT lacks. Pass `layers='skip'` or `layers='first'` to begin with layer 0.",
                stacklevel=3,
            )
        return filled

    def _split(self, name: str) -> tuple[int | None, str]:
        """The layer that a parameter belongs to, and its name within it."""
        if not name.startswith(self.stack + "."):
            return None, name
        layer, _, rest = name[len(self.stack) + 1 :].partition(".")
        return int(layer), rest

    def _kinds(self, name: str, ndim: int) -> list[tuple[tuple[int | None, str], int]]:
        """For each axis of a weight: of which layer (None: the whole model) and kind it is, and in how many blocks."""
        layer, rest = self._split(name)
        kinds = ("h",) * ndim
        for pattern, two in self.axes if layer is not None else ():
            if re.search(pattern, rest):
                of_bias = two[1] if self.teacher.config.model_type == "gpt2" else two[0]
                kinds = two if ndim == 2 else (of_bias,)
                break
        return [((None if kind == "h" else layer, kind[0]), len(kind)) for kind in kinds]

    def _sliced(self, name: str, target: Tensor) -> Tensor:
        weight = self.source[name]
        for axis, (kind, blocks) in enumerate(self._kinds(name, weight.ndim)):
            if weight.shape[axis] != target.shape[axis]:
                size = weight.shape[axis] // blocks
                kept = torch.cat([block * size + self.kept[kind] for block in range(blocks)])
                weight = weight.index_select(axis, kept.to(weight.device))
        return weight

    def _kept(self) -> dict[tuple[int | None, str], Tensor]:
        """For each layer and kind of axis, the indices that stay, in order."""
        scores = self._scores()
        config, small = self.teacher.config, self.student.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # A group is the query heads that share a key and value head: it is kept or left out as one.
        groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        share = small.hidden_size / config.hidden_size
        kept: dict[tuple[int | None, str], Tensor] = {}
        for (layer, kind), score in scores.items():
            if kind in ("h", "i"):
                kept[layer, kind] = _largest(score, round(len(score) * share))
            elif kind == "q":
                of_group = score.view(groups, -1).sum(1)
                if (layer, "k") in scores:
                    of_group = of_group + scores[layer, "k"].view(groups, -1).sum(1)
                chosen = _largest(of_group, round(groups * share))
                kept[layer, "q"] = _expand(chosen, config.num_attention_heads // groups * head_dim)
                kept[layer, "k"] = _expand(chosen, head_dim)
        return kept

    def _scores(self) -> dict[tuple[int | None, str], Tensor]:
        """Mean square of the weights that read or write each channel, head dimension and neuron."""
        scores: dict[tuple[int | None, str], Tensor] = {}
        # An axis that does not shrink (positions, words, classes) has no say, even if it is as long as one that does.
        small = {self._split(name)[1]: weight.shape for name, weight in self.student.named_parameters()}
        for name, weight in self.source.items():
            for axis, (kind, blocks) in enumerate(self._kinds(name, weight.ndim)):
                if weight.shape[axis] == small.get(self._split(name)[1], weight.shape)[axis]:
                    continue
                rest = [other for other in range(weight.ndim) if other != axis]
                score = weight.float().square()
                score = (score.mean(rest) if rest else score).view(blocks, -1).sum(0)
                scores[kind] = scores[kind] + score if kind in scores else score
        return scores


def _largest(score: Tensor, count: int) -> Tensor:
    # Stable, so that equal scores keep the leading ones, on every machine.
    return score.cpu().sort(descending=True, stable=True).indices[:count].sort().values


def _expand(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size)).flatten()
