"""The parser of command lines: short flags, help by group, and errors of one line that say which flag was meant.

Lightning's own parser was tried in its place (``LightningArgumentParser`` with ``add_lightning_class_args``,
``add_optimizer_args`` and ``link_arguments``) and saves two lines, as it is the same jsonargparse:
``add_optimizer_args`` takes classes, where ``--optimizer lion`` names a function's argument; links have nothing to
link, as a recipe makes several Trainers and models of what it has read; an error is 62 lines of usage before the one
that counts; and ``LightningCLI`` makes its one Trainer, model and data module before a recipe could look at a file.
"""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from lightning_distill.optim import LRRange

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


class Flags(Namespace):
    """What was said on a command line, by name: ``flags.trainer.max_epochs``.

    Attributes:
        parser: The parser that made it.
        given: As it was parsed, whatever has been filled in since.
        recommended: The learning rates commonly recommended for the task; None where nobody recommends any.
        trainings: Names of the trainings that have begun.
    """

    __slots__ = ("given", "parser", "recommended", "trainings")
    given: Namespace
    parser: "FlagParser"
    recommended: LRRange | None
    trainings: list[str]

    @classmethod
    def of(cls, config: Namespace, parser: "FlagParser") -> "Flags":
        """What a parser has parsed."""
        flags = cls(config)
        flags.given, flags.parser, flags.recommended, flags.trainings = config.clone(), parser, None, []
        return flags


class FlagParser(ArgumentParser):
    """A parser whose errors are one line, which knows the short flags and takes no abbreviation.

    A file of flags stays one: ``--optimizer lion.yaml``. ``--objectives SoftTarget,HardLabel`` is a list. ``--help
    optimizer`` lists the flags ``--optimizer.*``.

    Args:
        *args: What jsonargparse's parser takes.
        job: The flags that ``--help`` lists, with patterns as ``model.*`` for a group; None: all.
        **options: What jsonargparse's parser takes.

    Example:
        >>> from lightning_distill.cli.parser import FlagParser
        >>> parser = FlagParser("program", exit_on_error=False)
        >>> _ = parser.add_argument("--num_layers", type=int)
        >>> parser.parse_args(["--num_layers=3"]).num_layers
        3
    """

    def __init__(self, *args: Any, job: Collection[str] | None = None, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=_Formatter, **options)
        self.job = job

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Flags:  # type: ignore[override]
        """Parse a command line; see jsonargparse."""
        words = list(sys.argv[1:] if args is None else args)
        self._help_by_group(words)
        try:
            config: Namespace = super().parse_args(_written_out(words), *rest, **options)
        except RecursionError:
            self.error("a file of flags holds itself, or is nested too deep")
        for group in self._groups():
            if not isinstance(config.get(group), Namespace):  # jsonargparse lets a file say `trainer: 3`
                self.error(f"--{group}: expected flags by name, but got {config.get(group)!r}")
        return Flags.of(config, self)

    def _groups(self) -> list[str]:
        """What the names of several flags begin with."""
        dests = [action.dest for action in self._actions if not action.dest.endswith(".help")]
        return list(dict.fromkeys(dest.partition(".")[0] for dest in dests if "." in dest))

    def _help_by_group(self, words: Sequence[str]) -> None:
        """Answer ``--help <group>``, where it is asked."""
        asked = [index for index, word in enumerate(words) if word.partition("=")[0] in ("-h", "--help")]
        groups = self._groups()
        if not asked or not groups:
            return
        following = [word for word in words[asked[0] + 1 : asked[0] + 2] if not word.startswith("-")]
        topic = words[asked[0]].partition("=")[2] or "".join(following)
        if topic and topic not in groups:
            self.error(f"there is no group {topic!r} for --help: expected one of {', '.join(groups)}")
        if topic:
            self.usage, self.description = argparse.SUPPRESS, None
            self.formatter_class = partial(_OfGroup, group=topic)  # type: ignore[assignment]
            print(super().format_help(), end="")
            self.exit()

    def format_help(self, *args: Any) -> str:
        """All flags, or those of the job on one screen and the names of the groups of all flags."""
        if self.job is None:
            return super().format_help(*args)
        asked = [action for action in self._actions if any(fnmatchcase(action.dest, name) for name in self.job)]
        flags = [_short(action) for action in asked]
        groups = textwrap.fill(", ".join(self._groups()), 100, initial_indent="  ", subsequent_indent="  ")
        return "\n".join(
            [
                (self.description or "").partition("\n")[0],
                f"(Commands to begin with stand at the head of {self.prog}.)\n",
                *flags,
                f"\nAll flags of a group, what they may be and their defaults: --help followed by one of\n{groups}\n",
            ]
        )

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


def _written_out(words: Iterable[str]) -> list[str]:
    """A command line with the short flags in full."""
    rest, given = iter(words), list[str]()
    for word in rest:
        name, equals, value = word.partition("=")
        if name in (*_SHORT, "--objectives"):
            following = [] if equals else [next(rest, None)]
            value = value if equals else following[0] or ""
            if name in _SHORT and not value.endswith((".yaml", ".yml", ".json")):
                name = _SHORT[name]
            if name == "--objectives" and value[:1] not in ("", "[", "{", "-") and value != "null":
                value = f"[{value}]"
            given.append(f"{name}={value}" if equals or following != [None] else name)
        else:
            given.append(word)
    return given


class _Formatter(DefaultHelpFormatter):
    """Keeps the line breaks of a description."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


class _OfGroup(_Formatter):
    """Shows the flags of one group."""

    def __init__(self, prog: str, group: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)
        self.group = group

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Add those of the group."""
        super().add_arguments([action for action in actions if _group_of(action) == self.group])


def _group_of(action: argparse.Action) -> str:
    return action.dest.partition(".")[0]


def _short(action: argparse.Action) -> str:
    """A flag on one line: its name, the first words on it, its default."""
    text = (action.help or "").replace("``", "").partition(". ")[0].rstrip(".")
    text = textwrap.shorten(text[0].lower() + text[1:], 66, placeholder=" ...")
    if "default" not in text and action.default not in (None, False, argparse.SUPPRESS):
        text = f"{text} (default: {action.default})"
    return f"{action.option_strings[0]:<32}{text}"


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
