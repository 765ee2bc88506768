"""``lightning-distill <command>``: what the library does from the shell."""

import argparse
from collections.abc import Sequence

from lightning_distill import cache_cli
from lightning_distill.cli import one_line_errors
from lightning_distill.quantization import cli as quantization

COMMANDS = {"cache": cache_cli.main, "quantize": quantization.main}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: Arguments; None for those of the shell.
    """
    parser = argparse.ArgumentParser("lightning-distill", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="`lightning-distill <command> --help` lists them")
    options = parser.parse_args(argv)
    with one_line_errors(f"lightning-distill {options.command}"):
        COMMANDS[options.command](options.arguments)


if __name__ == "__main__":
    main()
