"""
How the files of a memory's folder are written, safetensors shards and JSON, so that a killed save loses nothing.

A save goes to a temporary folder first; one rename decides whether the folder holds the old memory or the new one.
Knows neither models nor what the tensors mean. `knnmoe_hf.memory.shards` reads what is written here.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from knnmoe_hf.errors import MemoryFileError, in_one_line, shown
from knnmoe_hf.files import file_digest, write_json
from knnmoe_hf.memory.plain_files import LARGEST_JSON, is_inside, open_plain, parsed_json, unusable

CONFIG_FILE = "config.json"
MODEL_TYPE = "knn_moe"
"""Of a memory's configuration."""
INDEX_FILE = "memory.safetensors.index.json"
_SHARD = re.compile(r"memory-[0-9a-f]{16}(-\d{5}-of-\d{5})?\.safetensors")
_STAGING, _COMMITTED, _GONE = ".knnmoe-saving-", ".knnmoe-committed", ".gone.json"


@contextmanager
def staged(folder: Path, stale: Iterable[str]) -> Iterator[Path]:
    """
    A temporary folder whose files replace those of `folder` on success and are deleted on failure.

    One rename of the whole temporary folder commits the save: killed before it, the old memory is untouched; killed
    after it, `finish_save` moves the remaining files when the folder is next opened or saved to.

    Args:
        folder: exists, and no interrupted save is left in it; files in it that are not a memory's stay.
        stale: names of the old memory's files, which are deleted unless they are replaced.
    """
    for leftover in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        yield scratch
        gone = sorted({*stale} - set(relative_files(scratch)))
        (scratch / _GONE).write_text(json.dumps(gone))
        os.rename(scratch, folder / _COMMITTED)
        finish_save(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def finish_save(folder: Path) -> None:
    """
    Moves the files of a save that was committed but interrupted into place; does nothing where there is none.

    The folder may be a stranger's: nothing outside of it is moved, written over or deleted, whatever it says.

    Raises:
        MemoryFileError: if it is not left over from a save, or cannot be moved.
    """
    committed = folder / _COMMITTED
    if not os.path.lexists(committed):
        return
    try:
        names = _plain_names(committed)
        gone = _names_to_delete(committed) if names else []
        for name in (*names, *gone):
            if any((folder / above).is_symlink() for above in list(PurePosixPath(name).parents)[:-1]):
                raise ValueError(f"{shown(name)} would be in a folder that is a symbolic link")
        for name in names:
            if name != _GONE:
                _move(committed / name, folder / name)
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(committed)
    except MemoryFileError:
        raise
    except (OSError, ValueError) as error:
        if not os.path.lexists(committed):  # another process has finished it
            return
        way_out = "delete it, or save or download the memory again"
        raise unusable(committed, f"this leftover of a save cannot be used ({in_one_line(error)})", way_out) from error


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):  # another process that opens the memory has just moved it
        os.replace(source, target)


def _plain_names(folder: Path) -> list[str]:
    """
    The files below a folder, by their paths from there.

    Raises:
        ValueError: if it is a link, or holds anything but files and folders.
    """
    names, left = [], [folder]
    while left:
        place = left.pop()
        if stat.S_ISDIR(kind := place.lstat().st_mode):
            left += place.iterdir()
        elif stat.S_ISREG(kind):
            names.append(place.relative_to(folder).as_posix())
        else:
            raise ValueError(f"{shown(place.name)} is neither a file nor a folder")
    return sorted(names)


def _names_to_delete(committed: Path) -> list[str]:
    """The old memory's files that the new one does not have."""
    with open_plain(committed / _GONE) as file:
        names = parsed_json(file.read(LARGEST_JSON))
    if not isinstance(names, list) or not all(map(is_inside, names)) or CONFIG_FILE in names:
        raise ValueError(f"{_GONE} lists {shown(names)} where names of files in the folder are needed")
    return names


def is_shard(name: Any) -> bool:
    """Whether a file of this name is one of a memory's files of tensors."""
    return isinstance(name, str) and _SHARD.fullmatch(name) is not None


def relative_files(folder: Path) -> list[str]:
    """Every file below a folder, by its path from there."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_tensors(folder: Path, tensors: dict[str, Tensor], max_shard_size: int | str) -> list[dict]:
    """
    Writes tensors into one or more shards, and an index file if there are several.

    Returns:
        One `{"name", "sha256", "bytes"}` per shard.
    """
    sizes = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(  # of meta tensors: it would count views of one storage as one tensor
        sizes, filename_pattern="memory{suffix}.safetensors", max_shard_size=max_shard_size
    )
    digests = {}
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
        digests[name] = file_digest(folder / name)
    content = hashlib.sha256("".join(digests.values()).encode()).hexdigest()[:16]
    renamed = {name: name.replace("memory", f"memory-{content}", 1) for name in digests}
    for name, new in renamed.items():
        os.replace(folder / name, folder / new)
        (folder / new).chmod(0o644)  # safetensors makes files that only their owner can read
    if plan.is_sharded:
        weight_map = {key: renamed[name] for key, name in plan.tensor_to_filename.items()}
        write_json(folder / INDEX_FILE, {"metadata": plan.metadata, "weight_map": weight_map})
    return [
        {"name": new, "sha256": digests[name], "bytes": (folder / new).stat().st_size} for name, new in renamed.items()
    ]
