"""Classes of which some have more rows than others: weights for the loss, and draws that are equal."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_distill.arguments import finite


def check_class_weights(class_weights: Literal["balanced"] | Sequence[float] | None, balanced: bool, task: str) -> None:
    """Refuse the arguments ``class_weights`` and ``balanced`` of data where they cannot be right."""
    for name, value, wrong in (
        ("class_weights", class_weights, ("regression",)),
        ("balanced", balanced or None, ("regression", "multi_label")),
    ):
        if value is not None and task in wrong:
            raise ValueError(f"Expected argument `{name}` to be left out in {task}, but got {value!r}")
    if class_weights is None or class_weights == "balanced":
        return
    if isinstance(class_weights, str):
        raise ValueError(f"Expected argument `class_weights` to be 'balanced' or a list, but got {class_weights!r}")
    for weight in class_weights:
        finite("class_weights", weight)
    if task == "multi_label" and class_weights and min(class_weights) <= 0:
        raise ValueError(f"Expected argument `class_weights` to be weights above 0, but got {class_weights}")
    if not class_weights or min(class_weights) < 0 or max(class_weights) == 0:
        raise ValueError(f"Expected argument `class_weights` to be weights of at least 0, but got {class_weights}")


def class_weights_of(
    class_weights: Literal["balanced"] | Sequence[float], labels: Sequence[float], names: Sequence[str]
) -> list[float]:
    """A weight for each of the named classes, of which each training row has one.

    ``"balanced"`` is N / (C n_c) for a class of n_c of N rows, as scikit-learn has it; a row's mean weight is then 1.

    Raises:
        ValueError: there is not one weight for each class, or a class has no rows to balance.

    Example:
        >>> class_weights_of("balanced", [0, 0, 0, 1], ["many", "few"])
        [0.6666666666666666, 2.0]
    """
    if class_weights != "balanced":
        if len(class_weights) != len(names):
            raise ValueError(
                f"Expected argument `class_weights` to have {len(names)} weights, one for each of "
                f"{', '.join(names)}, but got {len(class_weights)}"
            )
        return [float(weight) for weight in class_weights]
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=len(names))
    if not counts.all():
        raise ValueError(
            f"Expected argument `class_weights` to be a list, but got 'balanced', and no training row is of the class "
            f"{names[int(counts.argmin())]!r}"
        )
    weights: list[float] = (len(labels) / (len(names) * counts)).tolist()
    return weights


def label_weights_of(
    class_weights: Literal["balanced"] | Sequence[float], counts: Sequence[int], num_rows: int, names: Sequence[str]
) -> list[float]:
    """A weight for each of several labels, where it is there: ``pos_weight`` of ``torch.nn.BCEWithLogitsLoss``.

    ``"balanced"`` is the number of rows without a label by those with it, as PyTorch's documentation advises.

    Raises:
        ValueError: there is not one weight for each label, or a label has no row, or every row, to balance.

    Example:
        >>> label_weights_of("balanced", [1, 2], 4, ["rare", "common"])
        [3.0, 1.0]
    """
    if class_weights != "balanced":
        return class_weights_of(class_weights, [], names)
    for name, count in zip(names, counts, strict=True):
        if not 0 < count < num_rows:
            raise ValueError(
                f"Expected argument `class_weights` to be a list, but got 'balanced', and {count} of {num_rows} "
                f"training rows have the label {name!r}"
            )
    return [(num_rows - count) / count for count in counts]


def equal_draws(classes: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """Draw as many samples as there are, each class equally often to one, in a random order.

    Within a class every sample is drawn before one is drawn again. A ``WeightedRandomSampler`` draws equally often on
    average alone, and leaves more samples out.

    Args:
        classes: the class of each sample, ``[N]``; a class without samples is not drawn.
        random: draws.

    Example:
        >>> drawn = equal_draws(np.array([0, 0, 0, 0, 0, 1]), np.random.default_rng(0))
        >>> len(drawn), int((drawn == 5).sum())
        (6, 3)
    """
    found = random.permutation(np.unique(classes))  # which classes get one more is drawn, too
    share, rest = divmod(len(classes), len(found))
    drawn = []
    for place, kind in enumerate(found):
        members, wanted = np.flatnonzero(classes == kind), share + (place < rest)
        rounds = [random.permutation(members) for _ in range(-(-wanted // len(members)))]
        drawn.append(np.concatenate([*rounds, members[:0]])[:wanted])
    return random.permutation(np.concatenate(drawn))
