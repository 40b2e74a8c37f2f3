"""A folder that is uploaded to a repository of the Hub in one commit: nobody can download a half of it."""

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from time import sleep

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from knnmoe_hf.errors import in_one_line, shown
from knnmoe_hf.memory.hub_errors import FAILURES, WAITS, cause_of, is_passing, patiently
from knnmoe_hf.memory.storage import is_shard, relative_files

logger = logging.getLogger(__name__)

_BRANCH = re.compile(r"(?!.*(\.\.|//|/\.|@\{|\.lock(/|$)))[^-/.~^:?*\[\\\s\x00-\x1f][^~^:?*\[\\\s\x00-\x1f]*(?<![/.])")
"""What git takes as the name of a branch."""
Check = Callable[[str, set[str]], Iterable[str]]


def commit_folder(
    api: HfApi,
    repo_id: str,
    folder: Path,
    check: Check,
    *,
    path_in_repo: str = "",
    revision: str | None = None,
    commit_message: str,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Uploads every file of a folder, and deletes others of the repository's folder, in one commit.

    The commit names its parent, so that it is made on what `check` has seen or not at all: if others commit meanwhile,
    it is checked again and made on theirs. An answer that got lost makes no second commit. Files whose content the Hub
    has already, also of an upload that was broken off, are not sent again.

    Args:
        api: with the token to use.
        repo_id: `"owner/name"`, which exists.
        folder: its files are uploaded under their paths in it, also those that a `.gitignore` of the repository names.
        check: is called with the commit that the upload is made on, and the names of the files that the repository's
            folder holds there; returns the names of those to delete, or raises.
        path_in_repo: folder of the repository; its top by default.
        revision: branch; made if there is none. With `create_pr` the revision that the pull request is for.
        commit_message: first line of the commit.
        create_pr: open a pull request.

    Raises:
        Exception: as `check` and the client raise them.
    """
    prefix = f"{path_in_repo}/" if path_in_repo else ""
    for wait in (*WAITS, None):
        head = _head(api, repo_id, revision, create_pr)
        there = _files(api, repo_id, path_in_repo, head)
        new = relative_files(folder)
        gone = sorted(({*check(head, there)} & there) - {*new})
        _make_branch(api, repo_id, revision, head, create_pr)
        # made anew in every round: the client notes in them what the branch held, and leaves equal files out
        added = [CommitOperationAdd(prefix + name, folder / name) for name in new]
        about = dict(revision=revision, create_pr=create_pr)
        for group in _one_by_one(added):
            patiently(api.preupload_lfs_files, repo_id, group, gitignore_content="", free_memory=False, **about)
        operations = [*added, *(CommitOperationDelete(prefix + name, is_folder=False) for name in gone)]
        parent = None if create_pr else head
        try:
            return api.create_commit(repo_id, operations, commit_message=commit_message, parent_commit=parent, **about)
        except FAILURES as failure:
            if create_pr or wait is None or not (is_passing(failure) or _is_outrun(failure)):
                raise
            # if the commit was made and its answer got lost, the next round has nothing to change
            logger.warning("%s: no commit yet (%s), trying again in %d s", repo_id, in_one_line(failure), wait)
            sleep(wait)


def _one_by_one(added: list[CommitOperationAdd]) -> list[list[CommitOperationAdd]]:
    """Tensors file by file: the client sends several in threads, which Ctrl-C would wait for."""
    large = [addition for addition in added if is_shard(addition.path_in_repo.rpartition("/")[2])]
    small = [addition for addition in added if addition not in large]
    return [*([addition] for addition in large), small]


def check_branch(revision: str | None) -> None:
    """
    Raises:
        ValueError: if what a push is to go to is a commit, or a name that no branch can have.
    """
    if revision is not None and not (isinstance(revision, str) and _BRANCH.fullmatch(revision)):
        raise ValueError(f"revision={shown(revision)} is not a name of a branch: use letters, digits, -, _, . and /.")
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(f"revision={shown(revision)} is a commit, which cannot be changed: name a branch.")


def _head(api: HfApi, repo_id: str, revision: str | None, create_pr: bool) -> str:
    """The commit of the branch, or of the main one, as which a branch that is not there yet will begin."""
    try:
        return patiently(api.model_info, repo_id, revision=revision).sha
    except RevisionNotFoundError:
        if create_pr or str(revision).startswith("refs/"):  # of a pull request
            raise
        return patiently(api.model_info, repo_id).sha


def _make_branch(api: HfApi, repo_id: str, revision: str | None, head: str, create_pr: bool) -> None:
    if revision is not None and not create_pr and not patiently(api.revision_exists, repo_id, revision):
        patiently(api.create_branch, repo_id, branch=revision, revision=head, exist_ok=True)


def _files(api: HfApi, repo_id: str, folder: str, commit: str) -> set[str]:
    """Every file below a folder of a commit, by its path from there."""

    def listed() -> set[str]:
        entries = api.list_repo_tree(repo_id, folder or None, recursive=True, revision=commit)
        start = len(folder) + 1 if folder else 0
        return {entry.path[start:] for entry in entries if isinstance(entry, RepoFile)}

    try:
        return patiently(listed)
    except RemoteEntryNotFoundError:  # no such folder yet
        return set()


def _is_outrun(failure: BaseException) -> bool:
    """Whether the branch has moved since it was looked at."""
    cause = cause_of(failure)
    return isinstance(cause, HfHubHTTPError) and cause.response.status_code in (409, 412)
