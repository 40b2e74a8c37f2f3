"""
Repositories of the Hub on the command line: where a memory is read from, where one is uploaded to, and the token.

This module imports no other library before a command runs, as `options.py`.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from knnmoe_hf.cli import values
from knnmoe_hf.cli.fields import add, option
from knnmoe_hf.cli.inherited import INHERITED
from knnmoe_hf.cli.parser import Parser
from knnmoe_hf.errors import shown
from knnmoe_hf.training.options import PROVENANCE


def repository(word: str) -> str:
    """The name of a repository, `name` or `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(word)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise argparse.ArgumentTypeError(f"{shown(word)} is not a name of a repository ({reason})") from error
    return word


# where a memory is read from


def add_source(parser: Parser, of: str | None = "memory", prefix: str = "") -> None:
    """
    `--revision` and `--subfolder` of the memory that the argument `of` names.

    Args:
        parser: of the command.
        of: the argument; None if it can be no folder.
        prefix: of the two options, where a command reads several memories: `"other-"`.
    """
    help = f"Branch, tag or commit of the {prefix.replace('-', ' ')}memory's repository; default main"
    parser.add_argument(f"--{prefix}revision", type=values.text, metavar="REVISION", help=help)
    help = f"Where in its folder or repository the {prefix.replace('-', ' ')}memory lies"
    parser.add_argument(f"--{prefix}subfolder", type=values.text, metavar="PATH", help=help)

    def check(options: argparse.Namespace) -> None:
        revision, given = source_of(options, prefix)["revision"], getattr(options, of)
        if revision is not None and given is not None and os.path.isdir(given):
            name = f"--{prefix}revision {shown(revision)}"
            raise ValueError(f"{name} needs a repository, and {shown(given)} is a folder: leave it out")

    if of is not None:
        parser.checks.append(check)


def source_of(options: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """What the options of `add_source` say, as arguments of `RoutingMemory.from_pretrained`."""
    prefix = prefix.replace("-", "_")
    subfolder = getattr(options, f"{prefix}subfolder")
    return {"revision": getattr(options, f"{prefix}revision"), "subfolder": subfolder or ""}


# where a memory is uploaded to


def add_upload(parser: Parser) -> None:
    """`--push-to-hub` of a command that builds, and what belongs to it."""
    group = parser.add_argument_group("uploading")
    group.add_argument("--push-to-hub", metavar="REPO", type=repository, help="Upload the memory to this repository")
    add_told(group)
    for name in ("hub_private_repo", "hub_revision"):
        add(group, name, INHERITED[name].convert, INHERITED[name].default, INHERITED[name].help)
    parser.checks.append(_check_upload_options)


def add_told(group) -> None:
    """What an upload tells of the references."""
    help = "Of the references, what is uploaded: text only if it is asked for here; default ids."
    add(group, "push_provenance", values.one_of(PROVENANCE), None, help)
    help = "Upload the token that follows each row too, which recall next_tokens and both need; they are the text."
    add(group, "push_next_tokens", None, None, help)


def _check_upload_options(options: argparse.Namespace) -> None:
    if options.push_to_hub is None:
        for name in ("push_provenance", "push_next_tokens", "hub_private_repo", "hub_revision"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"{option(name)} is not allowed without --push-to-hub: name a repository, or leave it out"
                )
        return
    told = options.push_provenance == "text" or options.push_next_tokens
    if (options.recall or "routing") != "routing" and not told:
        raise ValueError(
            f"--recall {options.recall} needs the tokens that follow the rows, which --push-to-hub leaves out: "
            "add --push-next-tokens or --push-provenance text"
        )


def check_upload(what: str) -> None:
    """
    Refuses an upload that needs no network to be known to fail.

    Args:
        what: is uploaded to, as in `"--push-to-hub me/memory"`.

    Raises:
        ValueError: naming the reason.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{what} is not possible while HF_HUB_OFFLINE is set: set it to 0, or do not upload.")
    if get_token() is None:
        raise ValueError(f"{what} needs a token: use hf auth login, or the variable HF_TOKEN.")


# the token


def add_token(group) -> None:
    """`--token`, for all that a command reads from the Hub and writes there."""
    help = "Access token of the Hub; better, as others cannot read it: hf auth login, or the variable HF_TOKEN"
    group.add_argument("--token", type=values.text, metavar="TOKEN", help=help)


@contextmanager
def logged_in(options: argparse.Namespace, words: Sequence[str]) -> Iterator[None]:
    """
    Inside this context, `--token` is the token of every library, as if the variable `HF_TOKEN` were set.

    Args:
        options: of the command.
        words: of the command line; a token among them is warned of.
    """
    if getattr(options, "token", None) is None:
        yield
        return
    if any(word.partition("=")[0] == "--token" for word in words) and not options.quiet:
        from knnmoe_hf.cli.messages import write

        way_out = "use hf auth login, or the variable HF_TOKEN"
        write(f"warning: --token leaves the token in the shell's history and in the list of processes: {way_out}")
    before = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = options.token
    try:
        yield
    finally:
        del os.environ["HF_TOKEN"]
        if before is not None:
            os.environ["HF_TOKEN"] = before
