"""`knnmoe select`: a memory of some layers, or of the rows that gained most."""

import argparse

from knnmoe_hf.cli import hub, paths, values
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.parser import Parser

EXAMPLE = "knnmoe select my-memory --layers 6 7 12 --output smaller-memory"


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    parser.add_argument("memory", type=paths.name, help="Folder or repository of a memory")
    hub.add_source(parser)
    help = "Decoder layers to keep; in the others the model routes as without a memory"
    parser.add_argument("--layers", type=values.whole(0), action="extend", nargs="+", metavar="N", help=help)
    help = "Rows to keep at most: those whose token gained most when the memory was built"
    parser.add_argument("--max-rows", type=values.whole(1), metavar="N", help=help)
    help = "Keep the rows whose token gained at least so many nats when the memory was built"
    parser.add_argument("--min-gain", type=values.number(), metavar="X", help=help)
    shared.add_output(parser)
    parser.checks.append(_check_usage)


def _check_usage(options: argparse.Namespace) -> None:
    if (options.layers, options.max_rows, options.min_gain) == (None, None, None):
        raise ValueError("name what is to be kept: --layers, --max-rows or --min-gain")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_edit(options, "memory")


def run(options: argparse.Namespace) -> None:
    """Selects, saves and reports."""
    from knnmoe_hf.cli.inside import save
    from knnmoe_hf.memory import RoutingMemory

    memory = RoutingMemory.from_pretrained(options.memory, **hub.source_of(options))
    if options.layers is not None:
        memory = memory.select_layers(options.layers)
    if options.max_rows is not None or options.min_gain is not None:
        memory = memory.select_rows(options.max_rows, options.min_gain)
    if not len(memory):
        raise ValueError(f"no row of {options.memory} gained so much: use a smaller --min-gain.")
    print(save(memory, options))
