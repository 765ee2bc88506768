"""What the classes of a model are called, and how the classes of two are put in one order."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.models.heads import is_language_model


def placeholder(index: int) -> str:
    """The name that transformers makes up for a class: ``LABEL_0``, ``LABEL_1`` ..."""
    return f"LABEL_{index}"


def placeholder_index(name: str) -> int | None:
    """The class that a placeholder name means, None for any other name.

    Example:
        >>> from lightning_distill.models.class_names import placeholder_index
        >>> placeholder_index("LABEL_10"), placeholder_index("label"), placeholder_index("LABEL_07")
        (10, None, None)
    """
    found = re.fullmatch(r"LABEL_(0|[1-9][0-9]*)", name)
    return int(found.group(1)) if found else None


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether names in the order of their ids are all made up by transformers, so that they say nothing."""
    return list(names) == [placeholder(index) for index in range(len(names))]


def class_names(model: Any, role: str = "model") -> list[str] | None:
    """The names of a model's classes in the order of its logits.

    Args:
        model: A model with a transformers config, one that has ``class_names`` itself (an ensemble), or any other.
        role: What the model is called where the user gave it, for the error.

    Returns:
        The names, or None where the model has none: a plain module, a language model, a single logit.

    Raises:
        ValueError: If the config says two things: ``id2label`` has gaps, ``label2id`` numbers a name of it otherwise,
            or ``LABEL_<i>`` is the name of another class than i.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from lightning_distill.models.class_names import class_names
        >>> sizes = dict(hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1)
        >>> class_names(BertForSequenceClassification(BertConfig(id2label={0: "no", 1: "yes"}, **sizes)))
        ['no', 'yes']
    """
    if not hasattr(model, "config"):
        own = getattr(model, "class_names", None)
        return list(map(str, own)) if isinstance(own, (list, tuple)) and len(own) > 1 else None
    if isinstance(model, nn.Module) and is_language_model(model):
        return None
    names = names_of_config(model.config, role)
    return None if names is None or len(names) < 2 else names


def names_of_config(config: Any, role: str = "model") -> list[str] | None:
    """The names of the classes in a transformers config, in the order of their ids; see :func:`class_names`."""
    by_id, by_name = getattr(config, "id2label", None), getattr(config, "label2id", None)
    if not isinstance(by_id, Mapping) or not by_id:
        return None
    try:
        # JSON has no whole numbers as keys.
        named = {int(index): str(name) for index, name in by_id.items()}
        numbered = {str(name): int(index) for name, index in (by_name or {}).items()}
    except (TypeError, ValueError) as error:
        raise _wrong(role, f"numbers in `id2label` and `label2id`, but got {by_id} and {by_name}") from error
    if sorted(named) != list(range(len(named))):
        raise _wrong(role, f"an `id2label` of the classes 0 to {len(named) - 1}, but got {sorted(named)}")
    names = [named[index] for index in range(len(named))]
    for index, name in named.items():
        if placeholder_index(name) not in (None, index):
            raise _wrong(role, f"{name!r} as the name of class {placeholder_index(name)} alone, but got {by_id}")
    in_order = sorted(numbered, key=numbered.__getitem__)
    if numbered and not are_placeholders(in_order):
        if are_placeholders(names) and sorted(numbered.values()) == list(range(len(names))):
            return in_order
        for name in names:
            number = numbered.get(name, -1)
            if not 0 <= number < len(names) or names[number] != name:
                raise _wrong(role, f"one number for {name!r}, but got id2label={by_id} and label2id={by_name}")
    return names


def _wrong(role: str, expected: str) -> ValueError:
    return ValueError(f"Expected the config of the {role} to have {expected}. Correct the config.")


def class_order(
    names: Sequence[str], other: Sequence[str], role: str = "student", other_role: str = "teacher"
) -> Tensor | None:
    """Index that puts other classes in the order of these.

    Classes of one name belong together; upper and lower case differ only where a model tells them apart. A placeholder
    (``LABEL_3``) is no name but a place: it stands for whatever is class 3 of the other.

    Args:
        names: The names of the classes in the order that is wanted.
        other: The names of the other classes in their order.
        role: What the first are called, for the error.
        other_role: What the second are called, for the error.

    Returns:
        None where the orders agree; otherwise int64 ``index`` of shape ``[classes]``, so that
        ``other_logits[..., index]`` is in the order of ``names``.

    Raises:
        ValueError: If there are more classes in one, a name has no partner, or one name is that of two classes.

    Example:
        >>> from lightning_distill.models.class_names import class_order
        >>> class_order(["no", "yes", "maybe"], ["Yes", "Maybe", "No"])
        tensor([2, 0, 1])
        >>> class_order(["no", "yes"], ["LABEL_0", "LABEL_1"]) is None
        True
    """
    if len(names) != len(other):
        raise ValueError(
            f"Expected {role} and {other_role} to have the same number of classes, but got {len(names)} and "
            f"{len(other)}: {list(names)} and {list(other)}."
        )
    if list(names) == list(other):
        return None
    sides = [[name.casefold() for name in side] for side in (names, other)]
    if any(len(set(side)) < len(side) for side in sides):
        sides = [list(names), list(other)]
    places = {name: place for place, name in enumerate(sides[1])}
    index = [
        places.get(name, place if placeholder(place) in (names[place], other[place]) else -1)
        for place, name in enumerate(sides[0])
    ]
    if sorted(index) != list(range(len(other))):
        raise ValueError(
            f"Expected {role} and {other_role} to name the same classes, each once, but got {list(names)} and "
            f"{list(other)}, in the order of their ids. Give both the same `id2label`, or train one on the classes of "
            "the other."
        )
    return None if index == sorted(index) else torch.tensor(index)


def check_data_classes(model: nn.Module, data: Any) -> None:
    """Refuse data whose classes are numbered in another order than those of a model.

    Args:
        model: The model that learns from the data, or is tested on it.
        data: A LightningDataModule with ``label_names``, as :class:`lightning_distill.data.TextClassificationData`;
            anything else is taken as it is.

    Raises:
        ValueError: If both name their classes, and their numbers or names differ, or their order.
    """
    names, of_data = class_names(model, "student"), getattr(data, "label_names", None)
    # Labels that are whole numbers are the names of nothing.
    if (
        not names
        or not of_data
        or not isinstance(of_data, (list, tuple))
        or all(str(name).lstrip("-").isdigit() for name in of_data)
    ):
        return
    if class_order(names, of_data, "student", "the data") is not None:
        raise ValueError(
            f"Expected the data to number their classes as the student does, {names}, but got {list(of_data)}. Pass "
            f"`label_names={names}` to the data."
        )
