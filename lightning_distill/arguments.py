"""Checks of arguments whose errors name the argument, say what was expected and what came."""

import functools
import inspect
import itertools
import math
import numbers
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_LOOKED_AT = 100  # items of a list: a data set has millions of lengths
_Callable = TypeVar("_Callable", bound=Callable[..., Any])


def typed(target: _Callable) -> _Callable:
    """Check the arguments of a function or a class against their annotations at every call.

    It looks at what people confuse: numbers, strings, booleans, None, lists and mappings of them, and classes. A whole
    number is a number; True is neither. Tuples and lists stand for each other. Which strings a ``Literal`` allows, and
    which numbers are in range, is said by the function itself, which knows why.

    Args:
        target: The function, or the class.

    Returns:
        The function, checked; the class itself, with its ``__init__`` checked.

    Raises:
        TypeError: At a call, if an argument is of another type.

    Example:
        >>> from lightning_distill.arguments import typed
        >>> @typed
        ... def double(value: float, name: str | None = None) -> float:
        ...     return 2 * value
        >>> double(3)
        6
        >>> double("3")
        Traceback (most recent call last):
        TypeError: Expected argument `value` to be a number, but got '3'.
    """
    if isinstance(target, type):
        target.__init__ = typed(target.__init__)  # type: ignore[misc]
        return target
    signature = inspect.signature(target)
    hints: dict[str, Any] = {}

    @functools.wraps(target)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not hints:  # at the first call, when every name that an annotation uses is defined
            hints.update(get_type_hints(target))
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = signature.parameters[name].kind
            if name in hints and kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                hint = hints[name]
                if not _fits(value, hint):
                    raise TypeError(f"Expected argument `{name}` to be {_describe(hint)}, but got {_shown(value)}.")
        return target(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return any(type(value) is type(part) for part in parts)
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    if origin is None:
        return not isinstance(hint, type) or hint is object or getattr(hint, "_is_protocol", False) or _is(value, hint)
    if origin is Callable:
        return callable(value)
    if not isinstance(origin, type):
        return True
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if issubclass(origin, Sequence):
        if hasattr(value, "__array__"):  # NumPy and torch know their own types
            return True
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            return False
        if origin is tuple and parts[-1] is not ...:
            return len(value) == len(parts) and all(map(_fits, value, parts))
        return all(_fits(item, parts[0]) for item in itertools.islice(value, _LOOKED_AT))
    return _is(value, origin)


def _is(value: Any, kind: type) -> bool:
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol, or another type that cannot be asked
        return True


_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", type(None): "None"}


def _describe(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_describe, parts)))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is Callable:
        return "a callable"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a dictionary"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        items = dict.fromkeys(_describe(part) for part in parts if part is not ...)
        return f"a list of {' or '.join(items)}" if items else "a list"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def one_of(name: str, value: object, choices: Iterable[object]) -> None:
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


def finite(name: str, value: float) -> None:
    """Refuse NaN and infinity.

    Args:
        name: The argument's name.
        value: Its value.

    Raises:
        ValueError: If it is one of them.

    Example:
        >>> from lightning_distill.arguments import finite
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
