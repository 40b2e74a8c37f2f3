"""`knnmoe adjust`: how far a memory is trusted, and how it is searched and mixed, set by hand."""

import argparse

from knnmoe_hf.cli import hub, paths, values
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.parser import Parser

EXAMPLE = "knnmoe adjust my-memory --threshold 0.6 --output careful-memory"
_THRESHOLDS = {
    "threshold": (
        "Where a calibrated memory opens, between ordinary text (0) and the references (1): lower gains and harms more"
    ),
    "width": "How softly it opens around that",
    "next_token_threshold": "The same for the recall of next tokens, which has a threshold of its own",
}


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    parser.add_argument("memory", type=paths.name, help="Folder or repository of a memory")
    hub.add_source(parser)
    for name, help in _THRESHOLDS.items():
        kind = values.number(0) if name == "width" else values.number()
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=help)
    shared.add_output(parser)
    shared.add_query_options(parser, without=("layers",))
    parser.refused["--layers"] = "knnmoe select keeps some of a memory's layers"
    parser.checks.append(_check_usage)


def _check_usage(options: argparse.Namespace) -> None:
    if not shared.memory_options(options) and all(getattr(options, name) is None for name in _THRESHOLDS):
        raise ValueError("name what is to be set: --threshold, --confidence, --gamma or another option of the memory")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_edit(options, "memory")


def run(options: argparse.Namespace) -> None:
    """Sets, saves and reports."""
    from knnmoe_hf.cli.inside import save
    from knnmoe_hf.memory import RoutingMemory

    memory = RoutingMemory.from_pretrained(options.memory, **hub.source_of(options))
    memory = memory.with_options(**shared.memory_options(options))
    given = {name: getattr(options, name) for name in _THRESHOLDS if getattr(options, name) is not None}
    print(save(memory.with_threshold(**given) if given else memory, options))
