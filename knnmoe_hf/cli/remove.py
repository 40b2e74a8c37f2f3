"""`knnmoe remove`: a memory without some of its examples."""

import argparse

from knnmoe_hf.cli import hub, paths, values
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.parser import Parser

EXAMPLE = "knnmoe remove my-memory --example-ids 3 5 --output smaller-memory"


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    parser.add_argument("memory", type=paths.name, help="Folder or repository of a memory")
    hub.add_source(parser)
    help = "Ids of the examples to take out: their rows in the data set, counted from 0, unless it named them"
    how = dict(action="extend", nargs="+", metavar="ID", required=True)
    parser.add_argument("--example-ids", type=values.whole(), help=help, **how)
    shared.add_output(parser)


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_edit(options, "memory")


def run(options: argparse.Namespace) -> None:
    """Takes the examples out, saves and reports."""
    from knnmoe_hf.cli.inside import save
    from knnmoe_hf.memory import RoutingMemory

    memory = RoutingMemory.from_pretrained(options.memory, **hub.source_of(options))
    left = memory.remove_examples(options.example_ids)
    if not len(left):
        raise ValueError(f"no example of {options.memory} would be left: delete its folder instead.")
    print(save(left, options))
