"""``lightning-distill <command>``: what the library does from the shell."""

import sys
from collections.abc import Sequence

from lightning_distill.cli import cache as cache_cli
from lightning_distill.cli import quantize as quantization
from lightning_distill.cli.parser import FlagParser
from lightning_distill.cli.screen import one_line_errors
from lightning_distill.training.stops import stops

COMMANDS = {"cache": cache_cli.main, "quantize": quantization.main}
_GO_ON = {
    "cache": "the same command, which leaves out the rows that are there",
    "quantize": "the same command, which begins anew",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: Arguments; None for those of the shell.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = FlagParser(
        "lightning-distill", description=__doc__, epilog="lightning-distill <command> --help: its flags"
    )
    parser.add_argument("command", choices=list(COMMANDS), help="`lightning-distill <command> --help` lists its flags")
    command = parser.parse_args(words[:1]).command
    with stops(_GO_ON[command]), one_line_errors(f"lightning-distill {command}"):
        COMMANDS[command](words[1:])


if __name__ == "__main__":
    main()
