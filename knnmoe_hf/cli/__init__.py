"""The `knnmoe` command: build, evaluate, info, quickstart."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from knnmoe_hf.version import __version__

_COMMANDS = {
    "build": "build a memory from a model and reference text, and save it",
    "evaluate": "compare a model with and without its memory",
    "info": "print and check a memory, or plan one",
    "quickstart": "build, save, load, evaluate and generate in one go; without arguments on the shipped lab model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Returns:
        0 if it went well, 1 for an error (one line on stderr; a traceback with `--debug`), 130 if interrupted. Wrong
        usage exits with 2.
    """
    options = _parser(_named(argv)).parse_args(argv)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("knnmoe: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"knnmoe {options.command}: error: {reason}", file=sys.stderr)
        return 1
    return 0


def _named(argv: Sequence[str] | None) -> str | None:
    given = sys.argv[1:] if argv is None else argv
    return next((word for word in given if word in _COMMANDS), None)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str):
        """Exits with 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser(named: str | None) -> argparse.ArgumentParser:
    """The parser; only the command that is named is imported, so that `--help` is quick."""
    parser = _Parser(prog="knnmoe", description="Routing memories for frozen MoE language models.")
    parser.add_argument("--version", action="version", version=f"knnmoe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, purpose in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == named:
            module = importlib.import_module(f"knnmoe_hf.cli.{name}")
            command.description, command.epilog = purpose, f"example:\n  {module.EXAMPLE}"
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
