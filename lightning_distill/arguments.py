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


def integer(name: str, value: object, low: int, high: float = math.inf) -> None:
    """Refuse what is no whole number in [low, high].

    Args:
        name: The argument's name.
        value: Its value.
        low: The lowest that is allowed.
        high: The highest that is allowed.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is outside.

    Example:
        >>> from lightning_distill.arguments import integer
        >>> integer("batch_size", 0, 1)
        Traceback (most recent call last):
        ValueError: Expected argument `batch_size` to be at least 1, but got 0.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected argument `{name}` to be a whole number, but got {value!r}.")
    if not low <= value <= high:
        upper = "" if math.isinf(high) else f" and at most {high}"
        raise ValueError(f"Expected argument `{name}` to be at least {low}{upper}, but got {value!r}.")


def boolean(name: str, value: object) -> None:
    """Refuse what is neither True nor False: ``"false"`` and ``"no"`` would count as True.

    Args:
        name: The argument's name.
        value: Its value.

    Raises:
        TypeError: If it is something else.

    Example:
        >>> from lightning_distill.arguments import boolean
        >>> boolean("shuffle", "no")
        Traceback (most recent call last):
        TypeError: Expected argument `shuffle` to be True or False, but got 'no'.
    """
    if not isinstance(value, bool):
        raise TypeError(f"Expected argument `{name}` to be True or False, but got {value!r}.")
