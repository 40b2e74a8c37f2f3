"""`knnmoe remove`: a memory without some of its examples."""

import argparse
from typing import TYPE_CHECKING

from knnmoe_hf.cli import hub, paths, values
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.parser import Parser

if TYPE_CHECKING:  # which takes seconds to import
    from knnmoe_hf.memory import RoutingMemory

EXAMPLE = "knnmoe remove my-memory --example-ids 3 5 --output smaller-memory"


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    parser.add_argument("memory", type=paths.name, help="Folder or repository of a memory")
    hub.add_source(parser)
    help = "Ids of the examples to take out: their rows in the data set, counted from 0, unless it named them"
    parser.add_argument("--example-ids", type=values.whole(), action="extend", nargs="+", metavar="ID", help=help)
    help = "Take out the examples whose rows the audit finds suspicious (knnmoe info --audit names them)"
    parser.add_argument("--suspicious", action="store_true", help=help)
    shared.add_output(parser)
    parser.checks.append(_check_usage)


def _check_usage(options: argparse.Namespace) -> None:
    if not options.suspicious and not options.example_ids:
        raise ValueError("name what is to be taken out: --example-ids or --suspicious")
    if options.suspicious and options.example_ids:
        raise ValueError("--suspicious and --example-ids exclude each other: leave one of them out")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_edit(options, "memory")


def run(options: argparse.Namespace) -> None:
    """Takes the examples out, saves and reports."""
    from knnmoe_hf.cli.inside import save
    from knnmoe_hf.memory import RoutingMemory

    memory = RoutingMemory.from_pretrained(options.memory, **hub.source_of(options))
    left = memory.remove_examples(_suspicious(memory, options) if options.suspicious else options.example_ids)
    if not len(left):
        raise ValueError(f"no example of {options.memory} would be left: delete its folder instead.")
    print(save(left, options))


def _suspicious(memory: "RoutingMemory", options: argparse.Namespace) -> list[int]:
    """
    The examples that an audit names.

    Raises:
        ValueError: if there are none, or if what it found is not in single rows.
    """
    from knnmoe_hf.memory.audit import audit

    found = audit(memory)
    if not found.findings:
        raise ValueError(f"the audit finds nothing suspicious in {options.memory}: there is nothing to take out.")
    if not found.examples or not all(bool(finding.rows.any()) for finding in found.findings):
        raise ValueError(
            f"what the audit finds in {options.memory} is not in examples that could be taken out: see knnmoe info "
            "--audit, and do not attach this memory."
        )
    return list(found.examples)
