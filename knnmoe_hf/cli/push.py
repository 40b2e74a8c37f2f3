"""`knnmoe push`: a memory to a repository of the Hub."""

import argparse

from knnmoe_hf.cli import hub, paths, values
from knnmoe_hf.cli import options as shared
from knnmoe_hf.cli.fields import BUILD_FIELDS, add, add_fields
from knnmoe_hf.cli.parser import Parser
from knnmoe_hf.training.options import BuildOptions

EXAMPLE = "knnmoe push my-memory me/my-memory --private"
STATED = ("model_name", "license", "language", "dataset_name", "dataset_tags")
"""Options of a build on what its card states, which can be stated later too."""


def add_arguments(parser: Parser) -> None:
    """The command's arguments; names are those of `hf upload` and of `knnmoe build`."""
    parser.add_argument("memory", type=paths.name, help="Folder or repository of a memory")
    parser.add_argument(
        "repo_id", type=hub.repository, help="Repository to upload to; it is made if it does not exist"
    )
    parser.add_argument(
        "--path-in-repo", type=values.text, metavar="PATH", help="Folder in the repository; default: its root"
    )
    help = "Branch to upload to, which is made if it does not exist; default main"
    parser.add_argument("--revision", type=values.text, help=help)
    help = "Make the repository a private one, if it does not exist"
    add(parser, "private", None, None, help)
    parser.add_argument("--create-pr", action="store_true", help="Open a pull request in place of a commit")
    help = "First line of the commit's message"
    parser.add_argument("--commit-message", type=values.text, metavar="TEXT", help=help)
    hub.add_told(parser)
    add(parser, "overwrite", None, False, "Write over files of the repository that are not of this memory.")
    help = "Repository of the base model, if the memory was built from a folder: who loads the memory loads this model"
    parser.add_argument("--model", type=hub.repository, help=help)
    help = "Commit, branch or tag of the model's repository"
    parser.add_argument("--base-model-revision", type=values.text, metavar="REVISION", help=help)
    group = parser.add_argument_group("the model card (default: as it was saved)")
    add_fields(group, BUILD_FIELDS, STATED, said=False)
    parser.checks.append(shared.check_build)
    for name in ("provenance", "next-tokens"):
        parser.refused[f"--save-{name}"] = f"what is uploaded of the references is --push-{name}"
    parser.checks.append(_check_usage)


def _check_usage(options: argparse.Namespace) -> None:
    if options.base_model_revision is not None and options.model is None:
        raise ValueError("--base-model-revision is not allowed without --model: name the model, or leave it out")


def check(options: argparse.Namespace) -> None:
    """What can be said before anything heavy is imported."""
    paths.check_there(options.memory, "one that a memory was saved to")
    hub.check_upload(f"uploading to {options.repo_id}")


def run(options: argparse.Namespace) -> None:
    """Uploads and reports."""
    from knnmoe_hf.cli.pushing import edited_card, name_base, push
    from knnmoe_hf.memory import RoutingMemory
    from knnmoe_hf.memory.download import resolve_folder

    folder = resolve_folder(options.memory)
    memory = RoutingMemory.from_pretrained(folder)
    name_base(memory, options)
    names = ("revision", "private", "create_pr", "overwrite", "path_in_repo", "commit_message")
    how = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    card = edited_card(folder, options, [name for name in STATED if getattr(options, name) is not None])
    stated = BuildOptions(**shared.build_options(options)).card_statements()
    print(push(memory, options.repo_id, options, card=card, model_card_kwargs=stated, **how))
