"""Checks of arguments whose errors name the argument, say what was expected and what came."""

import math
from collections.abc import Iterable


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is none of the choices.

    Args:
        name: The argument's name.
        value: Its value.
        choices: What it may be.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> from lightning_distill.arguments import one_of
        >>> one_of("mode", "middle", ("min", "max"))
        Traceback (most recent call last):
        ValueError: Expected argument `mode` to be one of 'min', 'max', but got 'middle'.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"Expected argument `{name}` to be one of {', '.join(map(repr, choices))}, but got {value!r}.")


def between(name: str, value: float, low: float, high: float = math.inf, *, closed: bool = False) -> None:
    """Refuse a number outside (low, high], or outside [low, high] if closed.

    Args:
        name: The argument's name.
        value: Its value.
        low: The lower bound.
        high: The upper bound; infinity asks for a finite number.
        closed: Whether the lower bound itself is allowed.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is outside.

    Example:
        >>> from lightning_distill.arguments import between
        >>> between("decay", 1.5, 0, 1)
        Traceback (most recent call last):
        ValueError: Expected argument `decay` to be above 0 and at most 1, but got 1.5.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected argument `{name}` to be a number, but got {value!r}.")
    if math.isinf(value) or not (low <= value <= high) or (value == low and not closed):
        lower = f"{'at least' if closed else 'above'} {low:g}"
        upper = "finite" if math.isinf(high) else f"at most {high:g}"
        raise ValueError(f"Expected argument `{name}` to be {lower} and {upper}, but got {value!r}.")
