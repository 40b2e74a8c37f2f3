"""Where a memory lies: in a folder, or in the cache of the Hub, to which it is downloaded at one commit."""

import logging
from contextlib import suppress
from os import PathLike
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from knnmoe_hf.errors import MemoryFileError, shown
from knnmoe_hf.memory import ownership, storage
from knnmoe_hf.memory.hub_errors import FAILURES, check_repository_name, check_token, patiently, told_in_one_sentence
from knnmoe_hf.memory.plain_files import is_inside, read_json

logger = logging.getLogger(__name__)


def resolve_folder(
    name_or_path: str | PathLike,
    revision: str | None = None,
    subfolder: str = "",
    *,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """
    The local folder of a memory; a repository's is downloaded to the cache, all files of it at one commit.

    Args:
        name_or_path: a folder, or a repository id such as `"me/my-memory"`.
        revision: branch, tag, commit or pull request (`"refs/pr/1"`) of the repository.
        subfolder: where in the folder or repository the memory lies, such as `"memory"` in a model's own repository.
        token, cache_dir, local_files_only, force_download: as in `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: for a subfolder that leads out of the folder.
        FileNotFoundError: if there is no such folder, repository, revision or subfolder, or none in the cache offline.
        PermissionError: for a gated repository, or a login that is not accepted or may not read it.
        ConnectionError: if the Hub fails or cannot be reached.
    """
    subfolder = inside(subfolder, "subfolder")
    folder = Path(name_or_path)
    if folder.is_dir():
        storage.finish_save(folder / subfolder)
        return folder / subfolder
    name = str(name_or_path)
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"{shown(name)} is not a folder: name one that a memory was saved to.")
    hub = dict(token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download)
    return download(name, revision, subfolder, **hub)


def download(
    repo_id: str,
    revision: str | None = None,
    subfolder: str = "",
    *,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """
    A memory of a repository, whatever folders there are here; `.../snapshots/COMMIT/subfolder` in the cache.

    Arguments and errors are as of `resolve_folder`.
    """
    subfolder = inside(subfolder, "subfolder")
    check_token(token)
    check_revision(revision)
    try:
        check_repository_name(repo_id)
    except ValueError as error:
        raise FileNotFoundError(
            f"{shown(repo_id)} is neither a folder nor a name of a repository: check it."
        ) from error
    options = dict(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    with told_in_one_sentence(repo_id, revision, offline=local_files_only):
        commit = patiently(HfApi().resolve_revision, repo_id, revision=revision, **options)
        return _download(repo_id, commit, subfolder, options | {"force_download": force_download})


def inside(path: str, what: str) -> str:
    """
    A path in a folder or repository, without slashes at its ends.

    Raises:
        ValueError: if it leads out of there, or no folder can have this name.
    """
    parts = PurePosixPath(str(path).strip("/")).parts
    if ".." in parts or "\\" in str(path):
        raise ValueError(f"{what}={shown(path)} leads out of the folder: name a folder inside of it.")
    place = "/".join(part for part in parts if part != ".")
    if place and not is_inside(place):
        raise ValueError(
            f"{what}={shown(path)} is not a folder: use letters, digits, -, _ and ., with / between folders."
        )
    return place


def check_revision(revision: str | None) -> None:
    """
    Raises:
        ValueError: for what no branch, tag or commit is called.
    """
    if revision is not None and not (isinstance(revision, str) and revision.strip() and revision.isprintable()):
        raise ValueError(
            f"revision={shown(revision)} is not a revision: name a branch, a tag or a commit, or leave it out."
        )


def _download(repo_id: str, commit: str, subfolder: str, options: dict) -> Path:
    """Of a resolved revision: `config.json` first, which names the memory's other files, and then these."""
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        config = patiently(hf_hub_download, repo_id, prefix + storage.CONFIG_FILE, revision=commit, **options)
    except RemoteEntryNotFoundError as error:
        raise _no_memory(repo_id, commit, subfolder, options["token"]) from error
    if (kind := _model_type(Path(config))) != storage.MODEL_TYPE:
        raise _no_memory(repo_id, commit, subfolder, options["token"], f"its config.json is of the model type {kind}")
    needed, others = _named_by(Path(config))
    offline = options["local_files_only"] or constants.HF_HUB_OFFLINE
    for name in (*needed, *others):  # one after another: Ctrl-C would wait for the threads of snapshot_download
        try:
            patiently(hf_hub_download, repo_id, prefix + name, revision=commit, **options)
        except RemoteEntryNotFoundError:
            logger.debug("%s has no %s%s", repo_id, prefix, name)  # what is needed is missed when it is read
        except LocalEntryNotFoundError:
            if name in needed or not offline:
                raise
    return Path(config).parent


def _named_by(config: Path) -> tuple[list[str], list[str]]:
    """
    The files that a memory's `config.json` names, whatever its format: those that are read, and others.

    What is wrong with it is said when it is read.
    """
    needed, others = set(), {ownership.CARD}
    with suppress(MemoryFileError, TypeError, AttributeError, KeyError):
        memory = read_json(config)["memory"]
        needed = {*(memory.get("tokenizer_files") or []), *(entry["name"] for entry in memory["files"])}
        if len(memory["files"]) > 1:  # what is not there must not be asked for: that fails while the Hub is down
            others.add(storage.INDEX_FILE)
        others |= {*(memory.get("digests") or {})}
    return sorted(filter(is_inside, needed)), sorted(filter(is_inside, others - needed))


def _model_type(config: Path) -> str:
    """What a `config.json` is of, as it is shown; that of a memory where this cannot be told yet."""
    with suppress(MemoryFileError):
        kind = read_json(config).get("model_type")
        if isinstance(kind, str) and kind != storage.MODEL_TYPE:
            return shown(kind)
    return storage.MODEL_TYPE


def _no_memory(
    repo_id: str, commit: str, subfolder: str, token: str | bool | None, reason: str = "there is no config.json"
) -> FileNotFoundError:
    """Says in which folders of the repository there is a memory."""
    places: list[str] = []
    with suppress(*FAILURES):
        files = {*HfApi().list_repo_files(repo_id, revision=commit, token=token)}
        shards = {path.rpartition("/")[0] for path in files if storage.is_shard(path.rpartition("/")[2])}
        places = sorted(place for place in shards if f"{place}/{storage.CONFIG_FILE}".strip("/") in files)
        places = [place for place in places if place != subfolder]
    where = f"in its folder {shown(subfolder)}" if subfolder else "at its top"
    found = ", ".join(f"subfolder={shown(place)}" if place else "no subfolder" for place in places[:5])
    way_out = f"name the folder of the memory ({found})" if places else "name the repository of a memory"
    return FileNotFoundError(f"{shown(repo_id)} holds no memory {where}: {reason}, so {way_out}.")
