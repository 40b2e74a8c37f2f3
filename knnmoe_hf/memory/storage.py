"""
Files of a memory's folder: safetensors shards and JSON, written so that a killed save loses nothing.

A save goes to a temporary folder first; one rename decides whether the folder holds the old memory or the new one.
Knows neither models nor what the tensors mean.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from knnmoe_hf.errors import MemoryFileError, in_one_line, shown
from knnmoe_hf.files import cache_dir, file_digest, write_json
from knnmoe_hf.lookup.blocks import BLOCK, all_finite

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
INDEX_FILE = "memory.safetensors.index.json"
_SHARD = re.compile(r"memory-[0-9a-f]{16}(-\d{5}-of-\d{5})?\.safetensors")
_DTYPES = {  # as safetensors' headers spell them
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
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
    """Moves the files of a save that was committed but interrupted into place; does nothing where there is none."""
    committed = folder / _COMMITTED
    if not committed.is_dir():
        return
    gone = json.loads((committed / _GONE).read_text())
    for name in relative_files(committed):
        if name != _GONE:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(committed / name, folder / name)
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(committed)


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


def open_tensors(
    folder: Path,
    files: list[dict],
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]],
    below: dict[str, int] | None = None,
) -> dict[str, Tensor]:
    """
    Opens shards memory-mapped, after checking their names, sizes, tensors, shapes and dtypes.

    Contents (SHA-256, finite values, indices) are read and checked the first time that a file is opened; a note in the
    cache says which file passed.

    Args:
        folder: the memory's folder.
        files: as `write_tensors` returned them.
        expected: shape and dtype of every tensor that must be there.
        below: `{name of an index tensor: first index that is too large}`.

    Raises:
        MemoryFileError: naming the file and what is wrong with it.
    """
    left = dict(expected)
    with ExitStack() as stack:
        shards = {path: stack.enter_context(_opened(path)) for path in [_shard_path(folder, entry) for entry in files]}
        for path, shard in shards.items():
            for key in shard.keys():
                if key not in left:
                    reason = f"it holds the tensor {shown(key)}, which config.json does not describe or which is twice"
                    raise _broken(path, reason)
                _check_header(path, key, shard.get_slice(key), *left.pop(key))
        if left:
            raise _broken(folder, f"no shard holds the tensor {next(iter(left))}")
        for path, entry in zip(shards, files):
            _check_once(path, entry["sha256"], below or {})
        return {key: shard.get_tensor(key) for shard in shards.values() for key in shard.keys()}


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _broken(path, f"it is no readable safetensors file ({in_one_line(error)})") from error


def _check_header(path: Path, key: str, found, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    kind = _DTYPES.get(found.get_dtype(), found.get_dtype())
    if tuple(found.get_shape()) != shape or kind != dtype:
        described = f"{found.get_shape()} {kind} where config.json says {list(shape)} {dtype}"
        raise _broken(path, f"the tensor {key} is {described}")


def _shard_path(folder: Path, entry: dict) -> Path:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not is_shard(name):
        raise _broken(folder / CONFIG_FILE, f"it names {shown(name)} as a shard")
    path = folder / name
    if not path.is_file():
        raise _broken(path, "config.json names it but it does not exist")
    if type(entry.get("sha256")) is not str:
        raise _broken(folder / CONFIG_FILE, f"it gives no SHA-256 of {name}")
    if path.stat().st_size != entry.get("bytes"):
        raise _broken(path, f"it has {path.stat().st_size} bytes where config.json says {shown(entry.get('bytes'))}")
    return path


def _check_once(path: Path, sha256: str, below: dict[str, int]) -> None:
    """SHA-256, finite values and indices, unless this file, unchanged since, has passed before."""
    stat = path.stat()
    seen = {"path": str(path.resolve()), "sha256": sha256, "below": dict(sorted(below.items()))}
    seen |= {name: getattr(stat, f"st_{name}") for name in ("size", "mtime_ns", "ctime_ns", "ino")}
    note = cache_dir() / "verified" / f"{hashlib.sha256(seen['path'].encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, RecursionError):  # no note, or one that cannot be read: check
        if json.loads(note.read_text()) == seen:
            return
    if file_digest(path) != sha256:
        raise _broken(path, "its SHA-256 is not the one that config.json says, so it was changed after it was saved")
    with _opened(path) as shard:
        for key in shard.keys():
            if not all_finite(shard.get_tensor(key)):
                raise _broken(path, f"the tensor {key} has values that are not finite")
            if key in below and not _all_below(shard.get_tensor(key), below[key]):
                raise _broken(path, f"the tensor {key} has indices that are not from 0 to {below[key] - 1}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, seen)
    except OSError as error:
        logger.info("cannot remember that %s was checked: %s", path, error)


def _broken(path: Path, reason: str) -> MemoryFileError:
    return MemoryFileError(f"{path} is not usable: {reason}; save or download the memory again.")


def _all_below(tensor: Tensor, limit: int, rows: int = BLOCK) -> bool:
    return all(bool(((block >= 0) & (block.int() < limit)).all()) for block in tensor.split(rows))


def read_json(path: Path) -> dict:
    """
    Raises:
        MemoryFileError: if the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, f"it cannot be read as JSON ({in_one_line(error)})") from error
    if not isinstance(content, dict):
        raise _broken(path, "it holds no JSON object")
    return content
