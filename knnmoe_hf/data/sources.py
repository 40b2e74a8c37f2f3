"""Rows by name: of files, of folders that `datasets` saved, and of data sets of the Hub or its cache."""

import json
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets import packaged_modules
from datasets.arrow_reader import ReadInstruction
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from knnmoe_hf.data.files import (
    NAMES,
    Files,
    Row,
    is_on_disk,
    looks_like_path,
    shown_path,
    similar_name,
    splits_on_disk,
)
from knnmoe_hf.data.opening import checked_encoding, reason_of
from knnmoe_hf.errors import shown

_TIMEOUT = 10.0  # seconds for the Hub to answer whether it has a data set
_READERS_OF_DATASETS = {module.name for module in pkgutil.iter_modules(packaged_modules.__path__)}
"""Names as `json`, under which `datasets` reads whatever files are in the working folder."""


def open_source(
    name: str, split: str | None = None, text_field: str = "text", encoding: str | None = None
) -> "Files | Table":
    """
    The rows of a name. What exists on disk is never asked of the Hub, and what can only be a path neither.

    Args:
        name: a file, a folder, a pattern, or a data set of the Hub, `owner/name` or `owner/name:configuration`.
        split: of a data set, or an expression as `train[:100]`; of a folder whose files are named after splits; None
            for train.
        text_field: the column that text files get.
        encoding: of text files; None finds it.

    Raises:
        ValueError: if there is nothing of that name, or it cannot be read.
    """
    encoding = checked_encoding(encoding)
    saved = _saved_folder(name)
    if saved is None and (is_on_disk(name) or looks_like_path(name) and "://" not in name):
        return Files(name, split, text_field, encoding)
    if encoding is not None:
        raise ValueError(f"encoding={encoding!r} is not allowed for the data set {shown(name)}: leave it out.")
    if "://" in name:
        raise ValueError(f"{shown(name)} is an address, which is not read: download it, or {NAMES}.")
    return Table(_of_hub(name, split) if saved is None else _of_folder(saved, name, split), name)


class Table:
    """The rows of a data set of `datasets`."""

    what = "row"

    def __init__(self, dataset: datasets.Dataset, name: str):
        self.dataset, self.name = dataset.with_format(None), name

    def __iter__(self) -> Iterator[Row]:
        rows = iter(self.dataset)
        for index in range(len(self.dataset)):
            place = f"{shown_path(self.name)}, row {index + 1}"
            try:
                row = next(rows)
            except Exception as error:  # what a column's own decoder raises
                raise ValueError(f"{place} cannot be read ({reason_of(error)}): leave it out.") from error
            yield Row(place, index, row)

    def has_documents(self, count: int) -> bool:
        """Whether there are at least so many rows."""
        return len(self.dataset) >= count


def split_of_tests(name: str) -> str | None:
    """The split with the test examples, `"test"`; None for files and folders that have none."""
    saved = _saved_folder(name)
    if saved is not None:
        splits = saved / "dataset_dict.json"
        return "test" if splits.exists() and "test" in json.loads(splits.read_text())["splits"] else None
    if is_on_disk(name):
        return "test" if "test" in splits_on_disk(name) else None
    return None if looks_like_path(name) or name.startswith("lab:") else "test"


def _saved_folder(name: str) -> Path | None:
    """The folder of this name if `save_to_disk` wrote it."""
    folder = Path(name if os.path.lexists(name) else os.path.expanduser(name))
    has = {
        file: name and os.path.isfile(folder / file)
        for file in ("dataset_dict.json", "dataset_info.json", "state.json")
    }
    return folder if has["dataset_dict.json"] or has["dataset_info.json"] and has["state.json"] else None


def _of_folder(folder: Path, name: str, split: str | None) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # a missing or damaged file raises what the reader of its format does
        raise ValueError(
            f"{shown_path(name)} cannot be read as a saved data set ({reason_of(error)}): save it again."
        ) from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
        split = split or next(iter(loaded))
    try:
        wanted = str(split or "train")
        parts = ReadInstruction.from_spec("+".join(loaded) if wanted == "all" else wanted)
        parts = parts.to_absolute({name: len(dataset) for name, dataset in loaded.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"split={shown(wanted)} is not allowed for {shown_path(name)}, whose splits are {', '.join(loaded)} "
            f"({reason_of(error)}): choose one of these, or a part of it as {next(iter(loaded))}[:100]."
        ) from error
    return datasets.concatenate_datasets([loaded[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _of_hub(name: str, split: str | None) -> datasets.Dataset:
    repository, _, configuration = name.partition(":")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"{shown(name)} does not exist: {similar_name(name) or NAMES}.") from error
    if repository in _READERS_OF_DATASETS:
        raise ValueError(f"{shown(name)} is neither on disk nor a data set of the Hub: {NAMES}.")
    unreachable = _ask_hub(repository, name)
    try:
        with _offline_if(unreachable is not None):
            return datasets.load_dataset(repository, configuration or None, split=split or "train")
    except FileNotFoundError as error:
        raise ValueError(_not_found(name, reason_of(error))) from error
    except ConnectionError as error:
        raise ValueError(_not_found(name, unreachable or reason_of(error))) from error
    except Exception as error:  # builders of data sets raise what they like
        reason = reason_of(error.__cause__ or error)
        raise ValueError(
            f"the data set {shown(name)} cannot be loaded ({reason}): check its split, and its configuration, which "
            "is given as owner/name:configuration."
        ) from error


def _ask_hub(repository: str, name: str) -> str | None:
    """None if the Hub has the data set, and why it could not be asked if not; it is asked once."""
    if datasets.config.HF_HUB_OFFLINE:
        return "offline mode is on"
    try:
        HfApi().dataset_info(repository, timeout=_TIMEOUT)
    except GatedRepoError as error:
        raise ValueError(
            f"{shown(name)} is a gated data set: ask for access at https://huggingface.co/datasets/{repository}, and "
            "log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(_not_found(name, None)) from error
    except Exception as error:  # no network, no answer in time, an error of the server: the cache may have it
        return reason_of(error)
    return None


def _not_found(name: str, unreachable: str | None) -> str:
    place = f"in the cache of data sets, and the Hub cannot be asked ({unreachable})" if unreachable else "on the Hub"
    login = "" if unreachable else ", or log in with `hf auth login` if it is private"
    close = similar_name(name) if os.path.isdir(Path(name).parent) else ""
    return f"{shown(name)} is neither on disk nor {place}: {close or NAMES}{login}."


@contextmanager
def _offline_if(unreachable: bool) -> Iterator[None]:
    """Lets `datasets` look at its cache alone: without network it would try the Hub for half a minute."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or unreachable
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
