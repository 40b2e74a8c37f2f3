"""From the words of a command line to a command that runs, and to the one line that says why it failed."""

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress

from knnmoe_hf.cli.hub import logged_in
from knnmoe_hf.cli.interrupts import close_progress_bars
from knnmoe_hf.cli.messages import spoken
from knnmoe_hf.cli.options import add_common
from knnmoe_hf.cli.parser import Parser, suggestion
from knnmoe_hf.errors import shown
from knnmoe_hf.version import __version__

COMMANDS = {
    "build": "build a memory from a model and reference text, and save it",
    "evaluate": "compare a model with and without its memory, on any number of data sets",
    "compare": "compare methods on benchmarks: accuracy with intervals, cost and a report; resumes where it was",
    "explain": "show what a memory recalled for each token of a text, as a page of HTML",
    "report": "show a memory itself: what it gains and costs, which experts it changes, its keys; a page of HTML",
    "info": "say what a memory does and what is in it, and check its files; or plan one",
    "merge": "make one memory of two",
    "remove": "take examples out of a memory: those that are named, or those that the audit finds suspicious",
    "select": "keep some of a memory's layers, or the rows that gained most",
    "adjust": "set how far a memory is trusted, and how it is searched and mixed",
    "calibrate": "fit anew how far a memory is trusted",
    "push": "upload a memory to a repository of the Hub, in one commit",
    "pull": "download a memory from a repository of the Hub, and check it",
    "lm-eval": "evaluate on benchmarks: lm-evaluation-harness with memories, and its own options",
    "quickstart": "build, save, load, evaluate and generate in one go; without arguments on the shipped lab model",
}
"""
The commands, each a module of this folder with `EXAMPLE`, `add_arguments`, `check` and `run`. One that hands its words
to another program has `pass_on` and `shows_tracebacks` in place of these.
"""


class Command:
    """A run of the command line."""

    def __init__(self):
        self._options = argparse.Namespace(debug=False, prog="knnmoe")

    def run(self, argv: Sequence[str] | None) -> None:
        """
        Parses and runs.

        Raises:
            SystemExit: for wrong usage, and after a help text.
        """
        if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal has no letters for is not a reason to fail
            sys.stdout.reconfigure(errors="backslashreplace")
        words = list(sys.argv[1:] if argv is None else argv)
        self._options = parse(words)
        if "pass_on" in self._options:
            self._options.pass_on(words[1:])
        else:
            with logged_in(self._options, words):
                self._options.check(self._options)
                with spoken(self._options):
                    self._options.run(self._options)
        if sys.stdout is not None:
            sys.stdout.flush()

    def failed(self, error: BaseException) -> int:
        """
        Says on one line of stderr why a run failed.

        Returns:
            The exit code.

        Raises:
            BaseException: the error itself, with `--debug` and where it ends the process as it should.
        """
        if _nobody_reads(error):
            return 141  # as a program that the signal of a broken pipe ends
        if self._options.debug or not isinstance(error, Exception):
            raise error
        close_progress_bars()
        reason = " ".join(str(error).split()) or type(error).__name__
        with suppress(OSError):  # nobody reads stderr any more
            print(f"{self._options.prog}: error: {reason}", file=sys.stderr)
        return 1


def _nobody_reads(error: BaseException) -> bool:
    """Whether stdout is a pipe whose reader is gone; what is left to print goes nowhere then, without a message."""
    try:
        sys.stdout.flush()
        gone = isinstance(error, BrokenPipeError) and _is_broken(sys.stdout)
    except BrokenPipeError:
        gone = True
    except (OSError, AttributeError):  # a full disk, which is the error that is reported; or there is no stdout
        return False
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _is_broken(stream) -> bool:
    """Whether a stream is a pipe without a reader; an unbuffered one has nothing left that a flush would fail on."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """
    The options of a command line, checked as far as their values go; only the command that is named is imported.

    Raises:
        SystemExit: for wrong usage, and after a help text.
    """
    name = words[0] if words else ""
    if name not in COMMANDS:
        return _without_command(words)
    module = importlib.import_module(f"knnmoe_hf.cli.{name.replace('-', '_')}")
    if hasattr(module, "pass_on"):
        return argparse.Namespace(
            command=name, prog=f"knnmoe {name}", debug=module.shows_tracebacks(), pass_on=module.pass_on
        )
    parser = Parser(
        prog=f"knnmoe {name}",
        description=COMMANDS[name],
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    add_common(parser)
    parser.shorten_usage()
    parser.set_defaults(command=name, prog=parser.prog, run=module.run, check=module.check)
    return parser.parse_args(words[1:])


def _without_command(words: Sequence[str]) -> argparse.Namespace:
    """Help, the version, or what is wrong with the command's name."""
    parser = Parser(prog="knnmoe", description="Routing memories for frozen MoE language models.")
    parser.add_argument("--version", action="version", version=f"knnmoe {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="command", required=True)
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    if not words:
        parser.error(f"name a command: {', '.join(COMMANDS)}")
    first = next((word for word in words if not word.startswith("-")), None)
    if first is not None and words[0] in parser.options():
        return parser.parse_args(words[:1])
    if first in COMMANDS:
        parser.error(f"{shown(words[0])} comes after the command, as in knnmoe {first} {words[0]}")
    if first is not None:
        near = suggestion(first, COMMANDS)
        parser.error(f"there is no command {shown(first)}{near or ': choose one of ' + ', '.join(COMMANDS)}")
    return parser.parse_args(words)
