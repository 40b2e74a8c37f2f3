"""
Which files of a folder an earlier save of this library left there; a save writes over no others.

Nothing here writes to the folder.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from knnmoe_hf.errors import MemoryFileError, in_one_line, shown
from knnmoe_hf.files import file_digest
from knnmoe_hf.memory import storage
from knnmoe_hf.memory.fingerprint import same_gates
from knnmoe_hf.memory.manifest import Manifest
from knnmoe_hf.memory.plain_files import read_json

CARD, PICTURE = "README.md", "card.svg"
_ADAPTER = "adapter_config.json"  # beside it, transformers would load the adapter and never see the memory
TOKENIZER_PARTS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""Files that a tokenizer reads where they are, whether it wrote them or not."""
_WAY_OUT = "name another folder, or write over it with overwrite=True (--overwrite on the command line)"


@dataclass(frozen=True)
class Save:
    """
    What a save is about to write, as far as it must fit what is in the folder.

    Attributes:
        files: `{name: a copy to compare with, or None}` of the files beside the tensors, by their paths in the folder.
        fingerprint: gives the fingerprint of the memory's base model; it is called only if the folder holds a memory.
        base_model: name or path of the base model.
        overwrite: write over files that are not the memory's own.
    """

    files: Mapping[str, Path | None]
    fingerprint: Callable[[], Mapping[str, Any] | None]
    base_model: str | None = None
    overwrite: bool = False


def refuse_foreign_config(folder: Path, overwrite: bool = False, base_model: str | None = None) -> None:
    """
    Checks what can be seen before anything is known of the memory: that `folder` is one, and of what.

    Raises:
        FileExistsError: if `folder` is a file, or holds a model, an adapter or a memory that cannot be read.
        ValueError: if it is the folder of the base model itself.
    """
    if not (existing := existing_part(folder)).is_dir():
        raise FileExistsError(f"{shown(str(existing))} is a file where a folder is needed: name another.")
    if base_model is not None and os.path.isdir(base_model) and folder.is_dir() and folder.samefile(base_model):
        raise ValueError(
            f"{shown(str(folder))} is the folder of the base model, which the memory needs: name another folder."
        )
    if overwrite:
        return
    if (folder / _ADAPTER).exists():
        raise FileExistsError(f"{_ADAPTER} in {shown(str(folder))} is of a PEFT adapter: {_WAY_OUT}.")
    if (of := _kind_of_config(folder / storage.CONFIG_FILE)) is not None:
        raise FileExistsError(f"config.json in {shown(str(folder))} is {of}: {_WAY_OUT}.")


def _kind_of_config(path: Path) -> str | None:
    """What a `config.json` is, if it is not a memory's."""
    if path.is_symlink():
        return "a link to another file"
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except MemoryFileError:  # it may be another model's
        return "of another model"
    if content.get("model_type") != storage.MODEL_TYPE:
        return "of another model"
    return None if _manifest(path.parent) is not None else "of a memory that cannot be read"


def refuse_foreign_files(folder: Path, save: Save) -> None:
    """
    Checks that a save writes over no file but those that an earlier save left there, unchanged since.

    Args:
        folder: need not exist.
        save: what will be written.

    Raises:
        FileExistsError: naming the file, or the memory of another model, that would be lost.
        ValueError: if the folder is that of the base model itself.
    """
    refuse_foreign_config(folder, save.overwrite, save.base_model)
    for name in (storage.CONFIG_FILE, *save.files):
        _refuse_other_kinds(folder, name)
    manifest = _manifest(folder)
    _refuse_parts_of_another_tokenizer(folder, save, manifest)
    if save.overwrite:
        return
    if manifest is not None:
        _refuse_other_model(folder, manifest, save.fingerprint())
    for name, copy in save.files.items():
        path = folder / name
        if os.path.lexists(path) and not _is_own(path, name, manifest) and not _is_equal(path, copy):
            raise FileExistsError(
                f"{name} in {shown(str(folder))} was not written by an earlier save, or edited since: {_WAY_OUT}."
            )


def check_folder(folder: Path, save: Save) -> None:
    """
    Checks, before there is a memory, that a save to `folder` will not be refused; a build writes its rows there too.

    Raises:
        FileExistsError, ValueError: as `refuse_foreign_files`.
        PermissionError: if no file can be made in `folder`, or in the folder that it would be made in.
    """
    refuse_foreign_files(folder, save)
    place = existing_part(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise PermissionError(
            f"{shown(str(folder))} cannot be written to ({in_one_line(error)}): name another folder."
        ) from error


def existing_part(folder: Path) -> Path:
    """`folder`, or the closest folder above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))


def own_files(folder: Path) -> list[str]:
    """The files, other than `config.json`, that an earlier save left in `folder`, unchanged since."""
    manifest = _manifest(folder)
    if manifest is None:
        return []
    shards = [entry["name"] for entry in manifest.files if storage.is_shard(entry.get("name"))]
    return shards + [name for name in manifest.digests if _is_own(folder / name, name, manifest)]


def recorded_files(folder: Path) -> list[str]:
    """The files beside the tensors that the `config.json` of an earlier save in `folder` names, there or not."""
    manifest = _manifest(folder)
    return sorted(manifest.digests) if manifest is not None else []


def _manifest(folder: Path) -> Manifest | None:
    """Of the memory in `folder`; None if there is none, or one that cannot be read."""
    try:
        path = folder / storage.CONFIG_FILE
        return Manifest.from_json(read_json(path).get("memory"), path)
    except MemoryFileError:
        return None


def _refuse_other_kinds(folder: Path, name: str) -> None:
    """A folder where a file would be written, or a file where a folder would be: neither can be replaced."""
    for parent in list(PurePosixPath(name).parents)[:-1]:
        if os.path.lexists(folder / parent) and not (folder / parent).is_dir():
            raise FileExistsError(
                f"{parent} in {shown(str(folder))} is a file where a folder is needed: move it away."
            )
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        raise FileExistsError(f"{name} in {shown(str(folder))} is a folder where a file is needed: move it away.")


def _refuse_parts_of_another_tokenizer(folder: Path, save: Save, manifest: Manifest | None) -> None:
    """Beside the memory's tokenizer they would change it, or keep the memory from being opened."""
    if set(save.files) <= {CARD, PICTURE}:  # no tokenizer is saved
        return
    earlier = manifest.tokenizer_files if manifest is not None else []
    for name in TOKENIZER_PARTS:
        if name not in save.files and name not in earlier and os.path.lexists(folder / name):
            raise FileExistsError(
                f"{name} in {shown(str(folder))} would be read as a part of the memory's tokenizer: name another "
                "folder, or move it away."
            )


def _refuse_other_model(folder: Path, manifest: Manifest, fingerprint: Mapping[str, Any] | None) -> None:
    stored = manifest.origin.base_model_fingerprint
    if fingerprint is None or not same_gates(dict(stored), dict(fingerprint)):
        raise FileExistsError(f"{shown(str(folder))} holds the memory of another base model: {_WAY_OUT}.")


def _is_own(path: Path, name: str, manifest: Manifest | None) -> bool:
    recorded = manifest.digests.get(name) if manifest is not None else None
    return recorded is not None and path.is_file() and not path.is_symlink() and file_digest(path) == recorded


def _is_equal(path: Path, copy: Path | None) -> bool:
    """Whether writing `copy` to `path` would change nothing."""
    if copy is None or path.is_symlink() or not path.is_file():
        return False
    return file_digest(path) == file_digest(copy)
