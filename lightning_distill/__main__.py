"""``lightning-distill <command>``: what the library does from the shell."""

import argparse
from collections.abc import Sequence

from lightning_distill import cache_cli
from lightning_distill.cli import one_line_errors
from lightning_distill.quantization import cli as quantization
from lightning_distill.stops import stops

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
    parser = argparse.ArgumentParser("lightning-distill", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="`lightning-distill <command> --help` lists them")
    options = parser.parse_args(argv)
    with stops(_GO_ON[options.command]), one_line_errors(f"lightning-distill {options.command}"):
        COMMANDS[options.command](options.arguments)


if __name__ == "__main__":
    main()
