"""`knnmoe pull`: a memory from a repository of the Hub to a folder."""

import argparse

from knnmoe_hf.cli import hub, paths
from knnmoe_hf.cli.fields import add
from knnmoe_hf.cli.parser import Parser

EXAMPLE = "knnmoe pull me/my-memory my-memory --revision v1"


def add_arguments(parser: Parser) -> None:
    """The command's arguments."""
    parser.add_argument("repo_id", type=hub.repository, help="Repository of a memory")
    parser.add_argument("folder", type=paths.name, help="Folder to save the memory in")
    hub.add_source(parser, of=None)
    add(parser, "overwrite", None, False, "Write over files of the folder that are not of this memory.")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_folder(options.folder, of="")


def run(options: argparse.Namespace) -> None:
    """Downloads, checks, saves and reports."""
    from pathlib import Path

    from knnmoe_hf.cli.inside import received
    from knnmoe_hf.memory import RoutingMemory
    from knnmoe_hf.memory.copy import copy_folder
    from knnmoe_hf.memory.download import download

    snapshot = download(options.repo_id, **hub.source_of(options))
    RoutingMemory.from_pretrained(snapshot)  # checks every file before one of the folder is written over
    copy_folder(snapshot, Path(options.folder), options.overwrite)
    memory = RoutingMemory.from_pretrained(options.folder)
    print(received(memory, options.repo_id, snapshot, options.folder))
