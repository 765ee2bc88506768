"""A smaller model of the same kind, made from a teacher: fewer layers, narrower ones, weights carried over."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from lightning_distill.arguments import one_of, typed
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.models.wrapped import inside
from lightning_distill.students.carry import Carry
from lightning_distill.students.config import by_hand
from lightning_distill.students.depth import at_depth, of_depth, shape_for, shorter
from lightning_distill.students.layer_map import Layers
from lightning_distill.students.sizes import (
    Depth,
    build,
    depths,
    field_of,
    scaled,
    widths,
    with_fields,
)


@typed
def student_from_teacher(
    teacher: nn.Module | str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    num_decoder_layers: int | None = None,
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

    That is for any model of transformers: which fields of its config are numbers of layers and widths is found by
    changing them one at a time, and which entries of its weights are one channel, head or neuron by following a forward
    on the meta device. Where dropped channels are zero, norms over the width still see fewer of them, and where the
    input embeddings are tied to a head that a class scales by its width (Gemma, Marian) so does that scale.

    Args:
        teacher: The model, a folder or a hub id.
        num_layers: Layers of the student, at most the teacher's; None: all of them. Of a model of two towers (CLIP)
            those of each, of stages (Swin) all together, of an encoder-decoder those of the encoder.
        num_decoder_layers: Layers of the decoder of an encoder-decoder.
        width: Share of the teacher's width, in (0, 1]; None: all of it.
        compression_ratio: Parameters of the teacher divided by parameters of the student, above 1, instead of the
            three above. Layers go first; width goes too where one layer is still too many. The nearest that can be had.
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
    _check_model(model)
    one_of("init", init, ("teacher", "random"))
    found = depths(type(model), model.config)
    _check_depths(model, found, num_layers, num_decoder_layers)
    asked = {"num_layers": num_layers, "num_decoder_layers": num_decoder_layers, "width": width}
    if compression_ratio is not None:
        if beside := {name: value for name, value in asked.items() if value is not None}:
            raise ValueError(
                "Expected argument `compression_ratio` to stand alone, because it chooses layers and width, but got "
                f"{beside} beside it."
            )
        chosen, width = shape_for(model, found, compression_ratio)
    else:
        chosen = shorter(found, num_layers, num_decoder_layers)
    config, pairs = of_depth(model.config, found, chosen, layers)
    with _followed(model):
        narrower = {} if width is None or width == 1 else scaled(widths(type(model), model.config), width)
        student: nn.Module = type(model)(with_fields(config, narrower) if narrower else config)
        if init == "teacher":
            Carry(model, student, config, pairs).run()
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
        >>> import torch
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
    _check_model(big)
    if type(small) is not type(big):
        raise ValueError(
            f"Expected argument `student` to be a `{type(big).__name__}` as its teacher is, but got a "
            f"`{type(small).__name__}`."
        )
    found = depths(type(big), big.config)
    chosen = {depth.field: field_of(small.config, depth.field) for depth in found}
    _check_depths(
        big,
        found,
        *(
            next((d.total for d in at_depth(found, chosen) if d.of_decoder is decoder), None)
            for decoder in (False, True)
        ),
    )
    config, pairs = of_depth(big.config, found, chosen, layers)
    _check_sizes(big, small, config)
    return Carry(big, small, config, pairs, names).run()


def _check_sizes(teacher: Any, student: Any, config: Any) -> None:
    """Refuse a student of another size than a student of this teacher of its depth and hidden size has."""
    width = student.config.hidden_size / teacher.config.hidden_size
    with _followed(teacher):
        narrower = {} if width == 1 else scaled(widths(type(teacher), teacher.config), width)
    like = build(type(teacher), with_fields(config, narrower) if narrower else config)
    wanted, got = (
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} for model in (like, student)
    )
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise ValueError(
                f"Expected argument `student` to have the sizes of a student of this teacher, {wanted.get(name)} for "
                f"{name!r}, but got {got.get(name)}; `student_from_teacher` makes one that fits."
            )


def _check_model(teacher: Any) -> None:
    if inside(teacher) is not teacher:
        raise ValueError(
            f"Expected argument `teacher` to be a plain model, but got a `{type(teacher).__name__}`. Merge the adapter "
            "into its base first: `teacher.merge_and_unload()`."
        )
    if not isinstance(teacher, PreTrainedModel) or not depths(type(teacher), teacher.config):
        raise ValueError(
            f"Expected argument `teacher` to be a model of transformers whose config says how many layers it has, but "
            f"got a `{type(teacher).__name__}`. Make the student by hand, smaller, and pass it: "
            "`DistillationModule(teacher, student)`."
        )


def _check_depths(teacher: Any, found: list[Depth], num_layers: int | None, num_decoder_layers: int | None) -> None:
    for name, asked, of_decoder in (
        ("num_layers", num_layers, False),
        ("num_decoder_layers", num_decoder_layers, True),
    ):
        depth = min((depth.total for depth in found if depth.of_decoder is of_decoder), default=None)
        if asked is None:
            continue
        if depth is None:
            raise ValueError(
                f"Expected argument `{name}` to be None for a `{type(teacher).__name__}`, which has no such layers, "
                f"but got {asked}."
            )
        if not 1 <= asked <= depth:
            raise ValueError(
                f"Expected argument `{name}` to be from 1 to {depth}, the teacher's depth, but got {asked}."
            )


@contextmanager
def _followed(teacher: Any) -> Iterator[None]:
    """Say what to do where a forward has an operator that is not known here."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(
            f"Expected argument `width` to be 1 for a `{type(teacher).__name__}`, whose forward cannot be followed "
            f"past {error}. Make the student by hand, for example `{by_hand(teacher)}`, and pass it: "
            "`DistillationModule(teacher, student)`."
        ) from error
