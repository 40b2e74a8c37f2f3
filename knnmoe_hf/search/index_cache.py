"""Indexes of saved memories, kept in the library's cache directory, never in the memory's own folder."""

import hashlib
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from knnmoe_hf.files import as_bytes, cache_dir, replacing
from knnmoe_hf.search.base import SearchEngine, SearchOptions, StoredKeys

logger = logging.getLogger(__name__)

_UNUSED = 90 * 24 * 3600  # seconds without use after which an index is deleted
_FAILURES = (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError)  # of files and of libraries


def load_or_build(engine: type[SearchEngine], keys: StoredKeys, options: SearchOptions) -> SearchEngine:
    """
    The engine with its cached index; built and cached if there is none for these keys.

    Only indexes of saved keys, which have a `source`, are cached. A file is named by all that its index depends on
    (keys, engine, format, options), so that an outdated one is never found; it is deleted when it has not been used
    for three months and another index is cached.

    A cached index is hashed whenever it is opened, which takes about a second per GB: hnswlib and faiss may crash on
    damaged bytes, and damaged centroids or codes would give wrong neighbours without an error.

    Args:
        engine: the class of the engine.
        keys: to search.
        options: of the engine.
    """
    if keys.source is None:
        return engine(keys, options)
    content = _content(engine, keys, options)
    path = cache_dir() / "indexes" / f"{content[:32]}.safetensors"
    if path.is_file():
        try:
            return _read(path, content, engine, keys, options)
        except _FAILURES as error:
            logger.info("the cached index %s cannot be used and is built again: %s", path, error)
    built = engine(keys, options)
    try:
        _write(path, content, built)
    except _FAILURES as error:
        logger.warning("the index of %d keys cannot be cached, and will be built again: %s", len(keys), error)
    return built


def _read(
    path: Path, content: str, engine: type[SearchEngine], keys: StoredKeys, options: SearchOptions
) -> SearchEngine:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if file.metadata() != _metadata(content, tensors):  # a library may crash on the bytes of a damaged index
            raise ValueError("its contents are not what its metadata says.")
    read = engine.from_tensors(keys, options, tensors)
    with suppress(OSError):  # a cache that is read-only
        os.utime(path)
    return read


def _content(engine: type[SearchEngine], keys: StoredKeys, options: SearchOptions) -> str:
    """SHA-256 of all that an index depends on."""
    parts = [keys.source, list(keys.codes.shape), engine.__name__, engine.index_version()]
    parts += [getattr(options, name) for name in engine.index_options]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(path: Path, content: str, built: SearchEngine) -> None:
    if tensors := built.tensors():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            tensors = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
            save_file(tensors, temporary, metadata=_metadata(content, tensors))
        _remove_unused(path.parent)


def _remove_unused(folder: Path) -> None:
    """Safe beside other processes: an open file stays readable, and a deleted index can be built again."""
    with suppress(OSError):
        for path in folder.glob("*.safetensors*"):  # including unfinished files
            if time.time() - path.stat().st_mtime > _UNUSED:
                path.unlink(missing_ok=True)


def _metadata(content: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The metadata of an index file, by which a copied or damaged one is recognised."""
    return {"content": content, "sha256": _digest(tensors)}


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(as_bytes(tensor).numpy())
    return digest.hexdigest()
