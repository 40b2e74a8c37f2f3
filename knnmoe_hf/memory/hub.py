"""Uploading a memory to a repository of the Hub, and what can be checked before there is one."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client that huggingface_hub uses, also for a network that is not there
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from knnmoe_hf.errors import in_one_line, shown
from knnmoe_hf.memory import ownership, storage
from knnmoe_hf.memory.card import text_is_inside
from knnmoe_hf.memory.data import MemoryData
from knnmoe_hf.memory.folder import write_folder
from knnmoe_hf.memory.levels import at_level, tells_text

logger = logging.getLogger(__name__)

_SHARDS = [f"memory-{'?' * 16}.safetensors", f"memory-{'?' * 16}-?????-of-?????.safetensors", storage.INDEX_FILE]
_FAILURES = (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)


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
):
    """
    Saves the memory and uploads its folder; the base model's weights are never part of it.

    Args:
        repo_id: `"name"` or `"owner/name"`; made if it does not exist.
        path_in_repo: folder in the repository, for several memories in one.
        revision, private, token, commit_message, create_pr: as in `huggingface_hub`.
        max_shard_size: as in `save_pretrained`.
        provenance: as in `save_pretrained`, but the text of the references is uploaded only if it is asked for:
            `"text"`.
        overwrite: as in `save_pretrained`, for the files of the repository; a pull request writes over none.
        next_tokens: as in `save_pretrained`: without the text they are uploaded only if True, for they are the text.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        FileExistsError: naming the file of the repository that would be written over.
        ValueError: for a bad name, for text or next tokens of a memory that has none, or for neither of them where its
            own `recall` needs them.
        PermissionError, ConnectionError: if the Hub refuses, or cannot be reached.
    """
    check_repository_name(repo_id)
    memory, api = at_level(memory, provenance, next_tokens), HfApi()
    with _in_one_sentence(repo_id):
        repo = api.create_repo(repo_id, exist_ok=True, private=private, token=token)
        if revision is not None and not create_pr:
            api.create_branch(repo.repo_id, branch=revision, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        write_folder(memory, Path(place), max_shard_size)
        if not create_pr and not overwrite:
            files = [name for name in storage.relative_files(Path(place)) if not storage.is_shard(name)]
            save = ownership.Save(
                {name: Path(place) / name for name in files if name != storage.CONFIG_FILE},
                lambda: memory.origin.base_model_fingerprint,
            )
            _refuse_foreign_files(repo.repo_id, path_in_repo, revision, token, save)
        if tells_text(memory):
            logger.warning("%s", text_is_inside(memory, repo.repo_id))
        with _in_one_sentence(repo_id):
            return api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=place,
                path_in_repo=path_in_repo,
                revision=revision,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
                delete_patterns=_SHARDS,  # shards are named by their content: those of an earlier memory would stay
            )


@contextmanager
def _in_one_sentence(repo_id: str) -> Iterator[None]:
    """Inside this context, a failure of the Hub is one sentence with the way out."""
    name = shown(repo_id)
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"{name} cannot be written to: log in first, with `hf auth login`.") from error
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:
            raise ConnectionError(f"{name} cannot be reached: the Hub failed ({in_one_line(error)}).") from error
        raise PermissionError(
            f"{name} cannot be written to: check the name, your login (`hf auth whoami`) and that its token may write "
            f"there ({in_one_line(error)})."
        ) from error
    except _FAILURES as error:
        raise ConnectionError(f"{name} cannot be reached: check the network ({in_one_line(error)}).") from error


def check_repository_name(repo_id: str) -> None:
    """
    Checks the name of a repository, without a network.

    Raises:
        ValueError: for a name that no repository can have.
    """
    try:
        if not isinstance(repo_id, str) or not repo_id:
            raise HFValidationError("it is empty")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{shown(repo_id)} is no name of a repository: use name or owner/name of letters, digits, -, _ and . "
            f"({in_one_line(error)})."
        ) from error


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
        ValueError: for a bad name.
        PermissionError: without a login, or without the right to write there.
        ConnectionError: if the Hub cannot be reached.
        FileExistsError: if the repository holds something that the upload would write over.
    """
    check_repository_name(repo_id)
    api = HfApi()
    with _in_one_sentence(repo_id):
        api.whoami(token=token)
        repo = api.create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
        api.auth_check(repo, token=token, write=True)
    if fingerprint is not None and not overwrite:
        save = ownership.Save({ownership.CARD: None}, fingerprint)
        with _in_one_sentence(repo_id):  # a new branch begins as the main one
            there = revision is not None and api.revision_exists(repo, revision, token=token)
        _refuse_foreign_files(repo, "", revision if there else None, token, save)
    return repo


def _refuse_foreign_files(repo: str, subfolder: str, revision: str | None, token, save: ownership.Save) -> None:
    """As `ownership.refuse_foreign_files`, for a folder of a repository, of which the small files are downloaded."""
    if constants.HF_HUB_OFFLINE:  # then nothing can be uploaded either
        return
    prefix = f"{subfolder.strip('/')}/" if subfolder.strip("/") else ""
    wanted = [
        prefix + name
        for name in (storage.CONFIG_FILE, "adapter_config.json", *{*ownership.TOKENIZER_PARTS, *save.files})
    ]
    try:
        with tempfile.TemporaryDirectory() as place:
            snapshot_download(repo, revision=revision, token=token, allow_patterns=wanted, local_dir=place)
            ownership.refuse_foreign_files(Path(place) / prefix, save)
    except FileExistsError as error:
        reason = str(error).replace(f"{place}/", "").replace(place, repo).partition(": ")[0]
        raise FileExistsError(
            f"in the repository {shown(repo)}, {reason}: name another repository, or write over it with "
            "overwrite=True (--overwrite on the command line)."
        ) from error
    except _FAILURES as error:
        raise ConnectionError(
            f"{shown(repo)} cannot be read, so what an upload would write over is not known: {in_one_line(error)}."
        ) from error
