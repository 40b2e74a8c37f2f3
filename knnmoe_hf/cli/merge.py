"""`knnmoe merge`: one memory of two."""

import argparse

from knnmoe_hf.cli import hub, paths
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.parser import Parser

EXAMPLE = "knnmoe merge my-memory your-memory --output our-memory"


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    parser.add_argument("memory", type=paths.name, help="Folder or repository of a memory")
    parser.add_argument("other", type=paths.name, help="Another one for the same model, stored in the same way")
    hub.add_source(parser)
    hub.add_source(parser, "other", "other-")
    shared.add_output(parser)
    parser.checks.append(_check_usage)


def _check_usage(options: argparse.Namespace) -> None:
    same_place = hub.source_of(options) == hub.source_of(options, "other-")
    if same_place and paths.same(options.memory, options.other):
        raise ValueError(f"{options.other} is the same memory twice: name two")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_edit(options, "memory", "other")


def run(options: argparse.Namespace) -> None:
    """Merges, saves and reports."""
    from knnmoe_hf.cli.inside import save
    from knnmoe_hf.cli.messages import notice
    from knnmoe_hf.memory import RoutingMemory

    memory = RoutingMemory.from_pretrained(options.memory, **hub.source_of(options))
    other = RoutingMemory.from_pretrained(options.other, **hub.source_of(options, "other-"))
    if any(one.calibration is not None and one.calibration.threshold is not None for one in (memory, other)):
        notice(options, "a merged memory is not calibrated: knnmoe calibrate fits it anew")
    print(save(memory.merge(other), options))
