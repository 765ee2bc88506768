"""The parser of command lines: short flags, and errors of one line that say which flag was meant."""

import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

# The flag that asks for a callback, and the short ones for the name of a thing that has more flags.
SWITCHES = {
    "gradient_clipping": "gradient_clipping.algorithm",
    "lr_finder": "lr_finder.suggestion",
    "init_policy": "init_policy.policy",
    "teacher_cache": "teacher_cache.path",
}
_SHORT = {
    "--optimizer": "--optimizer.name",
    "--lr_scheduler": "--lr_scheduler.name",
    "--init_policy": "--init_policy.policy",
}
_TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a finite number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a string",
    "<class 'list'>": "a list",
    "<class 'dict'>": "a dictionary",
    "<class 'NoneType'>": "null",
}
# Lines that say how jsonargparse tried, not what is wrong.
_NOISE = (
    *("Given value", "Subtypes:", "Errors:", "Does not validate", "Subclass types expect", "a class path (str)"),
    *("a dict with", "Parser key"),
)
_EXPECTED = re.compile(r"Expected an? (typing\.Literal\[.*?\]|<class '.*?'>|.*?)(?:\. Got value: .*)?$", re.MULTILINE)


class FlagParser(ArgumentParser):
    """A parser whose errors are one line, which knows the short flags and takes no abbreviation.

    A file of flags stays one: ``--optimizer lion.yaml``. ``--objectives SoftTarget,HardLabel`` is a list.

    Args:
        *args: What jsonargparse's parser takes.
        **options: Likewise.

    Example:
        >>> from lightning_distill.cli.parser import FlagParser
        >>> parser = FlagParser("program", exit_on_error=False)
        >>> _ = parser.add_argument("--num_layers", type=int)
        >>> parser.parse_args(["--num_layers=3"]).num_layers
        3
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=_Formatter, **options)

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line; see jsonargparse."""
        words = iter(sys.argv[1:] if args is None else args)
        given: list[str] = []
        for word in words:
            name, equals, value = word.partition("=")
            if name in (*_SHORT, "--objectives"):
                following = [] if equals else [next(words, None)]
                value = value if equals else following[0] or ""
                if name in _SHORT and not value.endswith((".yaml", ".yml", ".json")):
                    name = _SHORT[name]
                if name == "--objectives" and value[:1] not in ("", "[", "{", "-") and value != "null":
                    value = f"[{value}]"
                given.append(f"{name}={value}" if equals or following != [None] else name)
            else:
                given.append(word)
        try:
            config: Namespace = super().parse_args(given, *rest, **options)
        except RecursionError:
            self.error("a file of flags holds itself, or is nested too deep")
        dests = [action.dest for action in self._actions if not action.dest.endswith(".help")]
        for group in {dest.partition(".")[0] for dest in dests if "." in dest}:
            if not isinstance(config.get(group), Namespace):  # jsonargparse lets a file say `trainer: 3`
                self.error(f"--{group}: expected flags by name, but got {config.get(group)!r}")
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line, and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"{self.prog}: error: {one_line(message)}{self._nearest(message)}\n")

    def _nearest(self, message: str) -> str:
        """The flags that those nobody knows were perhaps meant to be."""
        unknown = re.match(r"(?:unrecognized arguments: |.*does not accept option ')(.*?)'?$", message, re.DOTALL)
        if unknown is None:
            return ""
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        words = (word.partition("=")[0] for word in unknown[1].split())
        found = {
            word: difflib.get_close_matches(word, known, n=1, cutoff=0.7) for word in words if word.startswith("--")
        }
        meant = [near[0] for near in found.values() if near]
        return f" (did you mean {' and '.join(meant)}?)" if meant else "; --help lists the flags"


class _Formatter(DefaultHelpFormatter):
    """Keeps the line breaks of the docstring, where the commands stand."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def one_line(message: str) -> str:
    r"""What jsonargparse says of a flag, in one sentence.

    Args:
        message: Its error, of several lines.

    Example:
        >>> from lightning_distill.cli.parser import one_line
        >>> one_line("Parser key \"seed\":\n  Expected a <class 'int'>. Got value: x")
        "--seed: expected a whole number, but got 'x'"
    """
    key = re.match(r'Parser key "([^"]+)":\s*', message)
    where, rest = (f"--{key[1]}: ", message[key.end() :]) if key else ("", message)
    value = re.findall(r"(?:Given value|Got value): (.*)", rest)
    lines = [line.strip(" -") for line in rest.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_NOISE)]
    expected = list(dict.fromkeys(_described(match[1]) for line in lines if (match := _EXPECTED.match(line))))
    if "a finite number" in expected and "a whole number" in expected:
        expected.remove("a whole number")
    wanted = f"expected {' or '.join([name for name in expected if name != 'null'] or expected)}"
    # What is said of a class that was named tells more than that a list, or null, would be right too.
    telling = " ".join(line for line in lines if not _EXPECTED.match(line))
    if not telling or telling.endswith(":"):
        telling = f"{telling} {wanted}" + (f", but got {value[-1].strip()!r}" if value else "")
    return where + " ".join(telling.split())


def _described(kind: str) -> str:
    if kind.startswith("typing.Literal["):
        return "one of " + kind.removeprefix("typing.Literal[").removesuffix("]")
    if kind.startswith("dot import path string"):
        return "the name of a class"
    return _TYPES.get(kind, re.sub(r"<class '(?:.*\.)?(.*?)'>", r"\1", kind))
