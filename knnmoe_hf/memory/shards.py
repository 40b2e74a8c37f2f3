"""
The tensors of a saved memory: every file, header and number is checked before one of them is used.

A file is opened once; what is checked is what is mapped, whatever happens to its name in between.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from knnmoe_hf.errors import in_one_line, shown
from knnmoe_hf.files import as_bytes, cache_dir, write_json
from knnmoe_hf.lookup.blocks import Bounds, outside
from knnmoe_hf.memory.plain_files import open_plain, parsed_json, unusable
from knnmoe_hf.memory.storage import CONFIG_FILE, is_shard

logger = logging.getLogger(__name__)

Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor, by name."""
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
_CHECKS = 2
"""Part of the note on a file that passed; another number than in the note means that it is checked again."""
_HEADER_BYTES, _BYTES_PER_TENSOR = 2**16, 2**10
"""A header is no larger than the first, and the second for each tensor that is expected."""


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file: its shape and dtype, and where its bytes begin, counted from the file's first."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int


@dataclass(frozen=True)
class _Shard:
    """A file of tensors, open: `{name: _Entry}` in the order of their bytes, and its digest as config.json says."""

    path: Path
    file: BinaryIO
    sha256: str
    entries: Mapping[str, _Entry]


def open_tensors(
    folder: Path,
    files: list[dict],
    expected: Expected,
    bounds: Mapping[str, Bounds] | None = None,
    mmap: bool = True,
    optional: Collection[str] = (),
) -> dict[str, Tensor]:
    """
    Opens shards, after checking their names, sizes, headers, shapes, dtypes and contents.

    Contents (SHA-256, finite numbers within bounds) are read and checked the first time that a file is mapped; a note
    in the cache says which file passed. Nothing is allocated before the headers are known to describe what is expected
    and to fill their files.

    Args:
        folder: the memory's folder.
        files: as `knnmoe_hf.memory.storage.write_tensors` returned them.
        expected: what must be there, and nothing else.
        bounds: of the numbers in a tensor, by its name; for others see `knnmoe_hf.lookup.blocks.outside`.
        mmap: map the files; False reads them into memory, where nobody can change what was checked.
        optional: names of those that are expected but may be missing.

    Raises:
        MemoryFileError: naming the file and what is wrong with it.
    """
    left, bounds = dict(expected), bounds or {}
    with ExitStack() as stack:
        shards = []
        for entry in files:
            path, sha256, size = _described(folder, entry)
            if any(path == shard.path for shard in shards):
                raise unusable(folder / CONFIG_FILE, f"it names {path.name} twice")
            file = stack.enter_context(open_plain(path))
            _check_size(path, file, size)
            shards.append(_Shard(path, file, sha256, _header(path, file, len(expected))))
        for shard in shards:
            for name, found in shard.entries.items():
                _check_entry(shard.path, name, found, left)
        if missing := [name for name in left if name not in optional]:
            raise unusable(folder, f"no shard holds the tensor {missing[0]}")
        read = _mapped if mmap else _in_memory
        return {name: tensor for shard in shards for name, tensor in read(shard, bounds).items()}


def _described(folder: Path, entry: Any) -> tuple[Path, str, int]:
    """Path, SHA-256 and size of a shard, as config.json has them."""
    name = entry.get("name") if isinstance(entry, dict) else None
    if not is_shard(name):
        raise unusable(folder / CONFIG_FILE, f"it names {shown(name)} as a shard")
    if not isinstance(entry.get("sha256"), str):
        raise unusable(folder / CONFIG_FILE, f"it gives no SHA-256 of {name}")
    if type(entry.get("bytes")) is not int:
        raise unusable(folder / CONFIG_FILE, f"it gives {shown(entry.get('bytes'))} as the bytes of {name}")
    return folder / name, entry["sha256"], entry["bytes"]


def _check_size(path: Path, file: BinaryIO, size: int) -> None:
    found = os.fstat(file.fileno()).st_size
    if found != size:
        raise unusable(path, f"it has {found} bytes where config.json says {size}")


def _header(path: Path, file: BinaryIO, tensors: int) -> dict[str, _Entry]:
    """
    The tensors that a file's header describes, in the order of their bytes.

    Args:
        tensors: how many are expected in all files.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    try:
        if length > min(size - 8, _HEADER_BYTES + _BYTES_PER_TENSOR * tensors):
            raise ValueError(f"it says that its header has {length} bytes")
        content = parsed_json(file.read(length))
        content.pop("__metadata__", None)
        places = sorted((entry["data_offsets"], name) for name, entry in content.items())
        entries, end = {}, 8 + length
        for (begin, stop), name in places:
            entry = content[name]
            found = _Entry(tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"]), end)
            if begin != end - 8 - length or (taken := _bytes_of(found)) is not None and stop - begin != taken:
                raise ValueError(f"the bytes of the tensor {shown(name)} are not where they should be")
            entries[name], end = found, 8 + length + stop
        if end != size:
            raise ValueError(f"its tensors end at {end} of {size} bytes")
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise unusable(path, f"it is not a readable safetensors file ({in_one_line(error)})") from error
    return entries


def _bytes_of(entry: _Entry) -> int | None:
    """None for a dtype that no memory has; which is refused with the tensor's name later."""
    if not all(type(size) is int and size >= 0 for size in entry.shape):
        raise ValueError(f"{shown(list(entry.shape))} is not a shape")
    return math.prod(entry.shape) * entry.dtype.itemsize if isinstance(entry.dtype, torch.dtype) else None


def _check_entry(path: Path, name: str, found: _Entry, left: dict) -> None:
    """Takes the tensor from those that are left to be found."""
    if name not in left:
        raise unusable(
            path, f"it holds the tensor {shown(name)}, which config.json does not describe or which is twice"
        )
    shape, dtype = left.pop(name)
    if (found.shape, found.dtype) != (shape, dtype):
        kind = found.dtype if isinstance(found.dtype, torch.dtype) else shown(found.dtype)
        described = f"{shown(list(found.shape))} {kind} where config.json says {shown(list(shape))} {dtype}"
        raise unusable(path, f"the tensor {name} is {described}")


def _mapped(shard: _Shard, bounds: Mapping[str, Bounds]) -> dict[str, Tensor]:
    """The tensors as views of the mapped file, checked unless the file, unchanged since, has passed before."""
    linked = Path(f"/proc/self/fd/{shard.file.fileno()}")  # the file that is open, whatever its name leads to by now
    try:
        with safe_open(linked if linked.exists() else shard.path, framework="pt") as mapped:
            tensors = {name: mapped.get_tensor(name) for name in shard.entries}
    except (SafetensorError, OSError) as error:
        raise unusable(shard.path, f"it is not a readable safetensors file ({in_one_line(error)})") from error
    note, seen = _note_on(shard, bounds)
    with suppress(OSError, ValueError, RecursionError):  # no note, or one that cannot be read: check
        if json.loads(note.read_text()) == seen:
            return tensors
    shard.file.seek(0)
    _check_digest(shard, hashlib.file_digest(shard.file, "sha256").hexdigest())
    _check_numbers(shard, tensors, bounds)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, seen)
    except OSError as error:
        logger.info("cannot remember that %s was checked: %s", shard.path, error)
    return tensors


def _note_on(shard: _Shard, bounds: Mapping[str, Bounds]) -> tuple[Path, dict]:
    """Where it is noted that a file passed, and what is then noted: all that the checks depend on."""
    stat, path = os.fstat(shard.file.fileno()), str(shard.path.resolve())
    seen = {"path": path, "sha256": shard.sha256, "checks": _CHECKS}
    seen |= {name: getattr(stat, f"st_{name}") for name in ("size", "mtime_ns", "ctime_ns", "ino")}
    seen["bounds"] = {name: list(bounds[name]) for name in sorted(shard.entries) if name in bounds}
    return cache_dir() / "verified" / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json", seen


def _in_memory(shard: _Shard, bounds: Mapping[str, Bounds]) -> dict[str, Tensor]:
    """The tensors, read into memory and checked there."""
    tensors, digest = {}, hashlib.sha256()
    first = min((entry.start for entry in shard.entries.values()), default=os.fstat(shard.file.fileno()).st_size)
    shard.file.seek(0)
    digest.update(shard.file.read(first))
    for name, entry in shard.entries.items():
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        for part in _parts(as_bytes(tensor).numpy()):
            if shard.file.readinto(part) != len(part):
                raise unusable(shard.path, "it was truncated while it was read")
            digest.update(part)
        tensors[name] = tensor
    _check_digest(shard, digest.hexdigest())
    _check_numbers(shard, tensors, bounds)
    return tensors


def _parts(data, size: int = 2**26) -> Iterator[memoryview]:
    """At most 64 MiB at once: a single read gives no more than 2 GiB."""
    return (memoryview(data)[start : start + size] for start in range(0, len(data), size))


def _check_digest(shard: _Shard, found: str) -> None:
    if found != shard.sha256:
        reason = "its SHA-256 is not the one that config.json says, so it was changed after it was saved"
        raise unusable(shard.path, reason)


def _check_numbers(shard: _Shard, tensors: Mapping[str, Tensor], bounds: Mapping[str, Bounds]) -> None:
    for name, tensor in tensors.items():
        if (wrong := outside(tensor, bounds.get(name))) is not None:
            raise unusable(shard.path, f"the tensor {name} has {wrong}")
