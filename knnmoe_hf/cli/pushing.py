"""Uploading a memory: what is uploaded, and what is said of it then."""

import argparse
import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

from knnmoe_hf.cli.fields import option
from knnmoe_hf.cli.inside import contents
from knnmoe_hf.cli.messages import notice
from knnmoe_hf.errors import in_one_line, shown
from knnmoe_hf.memory import RoutingMemory, ownership
from knnmoe_hf.memory.card.base_name import repository_of
from knnmoe_hf.memory.folder import read_config
from knnmoe_hf.memory.levels import at_level
from knnmoe_hf.memory.plain_files import open_plain


def push(memory: RoutingMemory, repo_id: str, options: argparse.Namespace, **how: Any) -> str:
    """
    Uploads a memory.

    Args:
        memory: an open memory.
        repo_id: the repository.
        options: of the command, with `push_provenance` and `push_next_tokens`.
        how: further arguments of `RoutingMemory.push_to_hub`.

    Returns:
        What is to be printed: the commit or the pull request, what is inside, and how others use it.
    """
    level = options.push_provenance or ("none" if memory.provenance is None else "ids")
    with _in_words_of_options():
        told = at_level(memory, level, options.push_next_tokens)
        commit = memory.push_to_hub(repo_id, provenance=level, next_tokens=options.push_next_tokens, **how)
    where = commit.pr_url or commit.commit_url
    lines = [f"{memory!r} uploaded with provenance {level}: {where}", *contents(told)]
    if commit.pr_url:
        return "\n".join([*lines, "It is there once the pull request is merged."])
    words = ["knnmoe", "info", commit.repo_url.repo_id]
    for name, value in (("--revision", how.get("revision")), ("--subfolder", how.get("path_in_repo"))):
        words += [name, value] if value else []
    return "\n".join([*lines, f"Next: {shlex.join(words)}"])


@contextmanager
def _in_words_of_options() -> Iterator[None]:
    """Inside this context, an error names the options of the command line in place of the arguments."""
    try:
        yield
    except ValueError as error:
        said = re.sub(r"\bprovenance='(\w+)'", r"--push-provenance \1", str(error))
        said = said.replace("next_tokens=True", "--push-next-tokens").replace("private=True", "--private")
        said = said.replace("path_in_repo=", "--path-in-repo ").replace("revision=", "--revision ")
        if said == str(error):
            raise
        raise ValueError(said) from error


def name_base(memory: RoutingMemory, options: argparse.Namespace) -> None:
    """Gives the memory the base model that `--model` names, or says that others will not find the one it has."""
    config = memory.config
    if options.model is not None:
        config.base_model_name_or_path, config.base_model_revision = options.model, options.base_model_revision
    elif repository_of(memory) is None:
        notice(
            options,
            "the memory was built from a model in a folder, which others do not have: name the model's repository "
            "with --model, so that they can load it by the memory's name alone",
        )


def edited_card(folder: Path, options: argparse.Namespace, stated: Sequence[str]) -> str | None:
    """
    The memory's `README.md` if it was edited since it was saved, and is to be uploaded as it is; else None.

    Raises:
        ValueError: if the card was edited, and one of the options `stated` would change it, or the Hub would not
            take it.
        MemoryFileError: if it is a link, or no regular file.
    """
    path = folder / ownership.CARD
    saved = read_config(folder)[1].digests.get(ownership.CARD)
    if not os.path.lexists(path):
        return None
    with open_plain(path) as file:  # a link to another file of this machine would be uploaded in its place
        content = file.read()
    if hashlib.sha256(content).hexdigest() == saved:
        return None
    if stated:
        raise ValueError(
            f"{option(stated[0])} would change {ownership.CARD}, which was edited since it was saved: write it there, "
            "or delete the file for a new one."
        )
    notice(options, f"{ownership.CARD} was edited since it was saved, and is uploaded as it is")
    try:
        card = content.decode("utf-8")
        ModelCard(card)
    except (ValueError, YAMLError) as error:  # neither UTF-8 nor metadata that the Hub can read
        raise ValueError(
            f"{shown(str(path))} is not a model card ({in_one_line(error)}): mend it, or delete it for a new one."
        ) from error
    return card
