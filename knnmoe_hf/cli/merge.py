"""`knnmoe merge`: one memory of two."""

import argparse

from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli import paths
from knnmoe_hf.cli.parser import Parser

EXAMPLE = "knnmoe merge my-memory your-memory --output our-memory"


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    parser.add_argument("memory", type=paths.name, help="Folder or repository of a memory")
    parser.add_argument("other", type=paths.name, help="Another one for the same model, stored in the same way")
    shared.add_output(parser)
    parser.checks.append(_check_usage)


def _check_usage(options: argparse.Namespace) -> None:
    if paths.same(options.memory, options.other):
        raise ValueError(f"{options.other} is the same memory twice: name two")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_edit(options, options.memory, options.other)


def run(options: argparse.Namespace) -> None:
    """Merges, saves and reports."""
    from knnmoe_hf.cli.inside import save
    from knnmoe_hf.cli.messages import notice
    from knnmoe_hf.memory import RoutingMemory

    memory, other = (RoutingMemory.from_pretrained(name) for name in (options.memory, options.other))
    if any(one.calibration is not None and one.calibration.threshold is not None for one in (memory, other)):
        notice(options, "a merged memory is not calibrated: knnmoe calibrate fits it anew")
    print(save(memory.merge(other), options))
