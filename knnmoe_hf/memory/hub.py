"""Uploading a memory to a repository of the Hub in one commit, and what can be checked before there is one."""

import logging
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from knnmoe_hf.errors import shown
from knnmoe_hf.memory import ownership, storage
from knnmoe_hf.memory.card import text_is_inside
from knnmoe_hf.memory.card.base_name import published, stated
from knnmoe_hf.memory.data import MemoryData
from knnmoe_hf.memory.download import inside
from knnmoe_hf.memory.folder import write_folder
from knnmoe_hf.memory.hub_errors import check_repository_name, check_token, patiently, told_in_one_sentence
from knnmoe_hf.memory.levels import at_level, tells_text
from knnmoe_hf.memory.upload import check_branch, commit_folder

logger = logging.getLogger(__name__)

_IF_FULL = "or name another disk in TMPDIR, and push again"


def push_to_hub(
    memory: MemoryData,
    repo_id: str,
    *,
    path_in_repo: str = "",
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload routing memory",
    create_pr: bool = False,
    max_shard_size: int | str = "2GB",
    provenance: str | bool = "ids",
    overwrite: bool = False,
    next_tokens: bool | None = None,
    model_card_kwargs: Mapping[str, Any] | None = None,
    card: str | None = None,
):
    """
    Saves the memory and uploads its folder in one commit; the base model's weights are never part of it.

    The commit replaces an earlier memory in the same place. Nobody can download a half of it: before the commit the
    repository is what it was, also if the upload is broken off. A later push sends no file a second time.

    Args:
        repo_id: `"name"` or `"owner/name"`; made if it does not exist.
        path_in_repo: folder in the repository, for several memories in one, or for a memory beside its model.
        revision: branch, which is made from the main one if it does not exist; or a pull request (`"refs/pr/1"`).
        private: whether a repository that is made is private.
        token, commit_message, create_pr: as in `huggingface_hub`.
        max_shard_size: as in `save_pretrained`.
        provenance: as in `save_pretrained`, but the text of the references is uploaded only if it is asked for:
            `"text"`.
        overwrite: as in `save_pretrained`, for the files of the repository; a pull request writes over none.
        next_tokens: as in `save_pretrained`: without the text they are uploaded only if True, for they are the text.
        model_card_kwargs: what the model card states, such as `{"license": "cc-by-4.0", "dataset": ["guidelines"]}`:
            the names and values of `knnmoe_hf.memory.card_data.CardData.stated`.
        card: text of the `README.md`, in place of the model card that is written.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        FileExistsError: naming the file of the repository that would be written over.
        ValueError: for a bad name, path or branch, for `private=True` where the repository is public, for text or next
            tokens of a memory that has none, or for neither of them where its own `recall` needs them.
        PermissionError, ConnectionError: if the Hub refuses, or cannot be reached.
    """
    check_repository_name(repo_id)
    check_branch(revision)
    _check_login(repo_id, token)
    path_in_repo = inside(path_in_repo, "path_in_repo")
    if {".git", ".cache"} & {*path_in_repo.split("/")}:
        raise ValueError(f"path_in_repo={shown(path_in_repo)} is a folder that the Hub does not take: name another.")
    memory, api = stated(at_level(memory, provenance, next_tokens), model_card_kwargs), HfApi(token=token)
    memory = published(memory)  # under the name of its base model that was just stated, if it was
    repo = _make_repository(api, repo_id, private)
    with tempfile.TemporaryDirectory() as place:
        write_folder(memory, Path(place), max_shard_size, if_full=_IF_FULL)
        if card is not None:
            (Path(place) / ownership.CARD).write_text(card, encoding="utf-8")
        files = [name for name in storage.relative_files(Path(place)) if not storage.is_shard(name)]
        save = ownership.Save(
            {name: Path(place) / name for name in files if name != storage.CONFIG_FILE},
            lambda: memory.origin.base_model_fingerprint,
            overwrite=overwrite,
        )
        if tells_text(memory):
            logger.warning("%s", text_is_inside(memory, repo))
        with told_in_one_sentence(repo, revision, writing=True):
            return commit_folder(
                api,
                repo,
                Path(place),
                partial(_replaced, api, repo, path_in_repo, None if create_pr else save),
                path_in_repo=path_in_repo,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )


def check_push(
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    fingerprint: Callable[[], Mapping[str, Any] | None] | None = None,
    overwrite: bool = False,
) -> str:
    """
    Checks, before a build, that its memory can be uploaded; the repository is made if it does not exist.

    Args:
        repo_id, revision, private, token, overwrite: as in `push_to_hub`.
        fingerprint: gives the fingerprint of the gates of the model that is built for; without it, what the
            repository holds is not looked at.

    Returns:
        `"owner/name"`.

    Raises:
        ValueError: for a bad name or branch, or for `private=True` where the repository is public.
        PermissionError: without a login, or without the right to write there.
        ConnectionError: if the Hub cannot be reached.
        FileExistsError: if the repository holds something that the upload would write over.
    """
    check_repository_name(repo_id)
    check_branch(revision)
    _check_login(repo_id, token)
    api = HfApi(token=token)
    with told_in_one_sentence(repo_id, revision, writing=True):
        patiently(api.whoami)
    repo = _make_repository(api, repo_id, private)
    with told_in_one_sentence(repo, revision, writing=True):
        patiently(api.auth_check, repo, write=True)
        if fingerprint is not None and not overwrite:  # a new branch begins as the main one
            there = revision is not None and patiently(api.revision_exists, repo, revision)
            head = patiently(api.model_info, repo, revision=revision if there else None).sha
            names = {*patiently(api.list_repo_files, repo, revision=head)}
            _replaced(api, repo, "", ownership.Save({ownership.CARD: None}, fingerprint), head, names)
    return repo


def _check_login(repo_id: str, token: str | bool | None) -> None:
    check_token(token)
    if token is False:
        raise PermissionError(f"{shown(repo_id)} cannot be written to: token=False sends no login, so leave it out.")


def _make_repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """
    `"owner/name"` of a repository, which is made if it does not exist.

    Raises:
        ValueError: if it is to be private and is there and public, which would show the upload to all.
        PermissionError, ConnectionError: if the Hub refuses, or cannot be reached.
    """
    with told_in_one_sentence(repo_id, writing=True):
        repo = patiently(api.create_repo, repo_id, exist_ok=True, private=private).repo_id
        is_public = bool(private) and not patiently(api.model_info, repo).private
    if is_public:
        raise ValueError(
            f"private=True, but the repository {shown(repo)} is there already and public: make it private in its "
            "settings, or name another."
        )
    return repo


def _replaced(
    api: HfApi, repo: str, folder: str, save: ownership.Save | None, commit: str, there: set[str]
) -> list[str]:
    """
    The files of an earlier memory that an upload replaces, by their names in a folder of the repository.

    Args:
        save: what will be written, if it may not write over files that are not the memory's own.
        commit: what the upload is made on.
        there: names of the folder's files.

    Raises:
        FileExistsError: naming what would be written over.
    """
    prefix = f"{folder}/" if folder else ""
    wanted = {storage.CONFIG_FILE, "adapter_config.json", *ownership.TOKENIZER_PARTS}
    with tempfile.TemporaryDirectory() as place:

        def download(names: set[str]) -> None:
            for name in sorted(names & there):
                where = dict(revision=commit, token=api.token, local_dir=place)
                patiently(hf_hub_download, repo, prefix + name, **where)

        here = Path(place) / folder
        try:
            download({storage.CONFIG_FILE})
            download(wanted | {*(save.files if save else ()), *ownership.recorded_files(here)})
            if save is not None:
                ownership.refuse_foreign_files(here, save)
        except FileExistsError as error:
            reason = str(error).replace(f"{place}/", "").replace(place, repo).partition(": ")[0]
            raise FileExistsError(
                f"in the repository {shown(repo)}, {reason}: name another repository, or a folder of this one with "
                "path_in_repo= (--path-in-repo), or write over it with overwrite=True (--overwrite)."
            ) from error
        stale = [name for name in there if storage.is_shard(name)] + ownership.own_files(here)
    return [name for name in {*stale, storage.INDEX_FILE} if name in there]
