"""Checks of arguments whose errors name the argument, say what was expected and what came."""

import functools
import inspect
import itertools
import math
import numbers
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_Callable = TypeVar("_Callable", bound=Callable[..., Any])


def renamed(old: str, given: Any, new: str, value: Any) -> Any:
    """The value of an argument that had another name until this release, with a warning where that is used."""
    if given is None:
        return value
    warnings.warn(
        f"Argument `{old}` is called `{new}` now; the old name goes with the next release.",
        DeprecationWarning,
        stacklevel=3,
    )
    return given


def typed(target: _Callable) -> _Callable:
    """Check the arguments of a function or a class against their annotations at every call.

    mypy and jsonargparse check code and command lines; this is for a notebook, where ``"0.1"`` for a number would
    otherwise fail an hour later, or count as True. A whole number is a number; True is neither. Tuples and lists stand
    for each other. Which strings a ``Literal`` allows, and which numbers are in range, the function itself says, which
    knows why (an objective names itself).

    Args:
        target: The function, or the class.

    Returns:
        The function, checked; the class itself, with its ``__init__`` checked.

    Raises:
        TypeError: At a call, if an argument is of another type.

    Example:
        >>> @typed
        ... def double(value: float, name: str | None = None) -> float:
        ...     return 2 * value
        >>> double("3")
        Traceback (most recent call last):
        TypeError: Expected argument `value` to be a number, but got '3'.
    """
    if isinstance(target, type):
        target.__init__ = typed(target.__init__)  # type: ignore[misc]
        return target
    signature = inspect.signature(target)
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind not in rest]
    hints: dict[str, Any] = {}

    @functools.wraps(target)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not hints:  # at the first call, when every name that an annotation uses is defined
            hints.update(get_type_hints(target))
        given = signature.bind(*args, **kwargs).arguments
        for name in names:
            if name in given and name in hints and not _fits(given[name], hints[name]):
                shown = repr(given[name])
                shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
                raise TypeError(f"Expected argument `{name}` to be {_described(hints[name])}, but got {shown}.")
        return target(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return any(type(value) is type(part) for part in parts)
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):  # these cannot be asked
        return True
    if not parts or not issubclass(kind, Mapping | Sequence):
        return isinstance(value, kind)
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if hasattr(value, "__array__"):  # NumPy and torch know their own types
        return True
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    if kind is tuple and parts[-1] is not ...:
        return len(value) == len(parts) and all(map(_fits, value, parts))
    # Of a long list (the lengths of a data set) the first hundred.
    return all(_fits(item, parts[0]) for item in itertools.islice(value, 100))


_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", type(None): "None"}


def _described(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Callable:
        return "a callable"
    if kind is Literal:
        return " or ".join(map(repr, parts))
    items = " or ".join(dict.fromkeys(_described(part) for part in parts if part is not ...))
    if kind in (Union, types.UnionType):
        return items
    if isinstance(kind, type) and issubclass(kind, Mapping | Sequence):
        return "a dictionary" if issubclass(kind, Mapping) else f"a list of {items}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> one_of("mode", "middle", ("min", "max"))
        Traceback (most recent call last):
        ValueError: Expected argument `mode` to be one of 'min', 'max', but got 'middle'.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"Expected argument `{name}` to be one of {', '.join(map(repr, choices))}, but got {value!r}.")


def finite(name: str, value: float) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: If it is one of them.

    Example:
        >>> finite("start", float("nan"))
        Traceback (most recent call last):
        ValueError: Expected argument `start` to be finite, but got nan.
    """
    if not math.isfinite(value):
        raise ValueError(f"Expected argument `{name}` to be finite, but got {value!r}.")


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

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is outside.

    Example:
        >>> integer("batch_size", 0, 1)
        Traceback (most recent call last):
        ValueError: Expected argument `batch_size` to be at least 1, but got 0.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected argument `{name}` to be a whole number, but got {value!r}.")
    if not low <= value <= high:
        upper = "" if math.isinf(high) else f" and at most {high}"
        raise ValueError(f"Expected argument `{name}` to be at least {low}{upper}, but got {value!r}.")
