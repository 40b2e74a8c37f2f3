"""Indexes of memories that lie on disk, kept in the library's cache directory, never in the memory's own folder."""

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

_UNREADABLE = (
    OSError,
    SafetensorError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
)  # RuntimeError is what engines raise
_UNUSED = 90 * 24 * 3600  # seconds after which an index is taken for that of a memory, or a version, that is no more


def load_or_build(engine: type[SearchEngine], keys: StoredKeys, options: SearchOptions) -> SearchEngine:
    """
    The engine from its cached index, if there is one of these very keys; else built, and cached if they lie on disk.

    An index is named by all that it depends on, so that one that is stale is never found; it goes when it was not used
    for three months and another is kept.
    """
    if keys.source is None:
        return engine(keys, options)
    content = _content(engine, keys, options)
    path = cache_dir() / "indexes" / f"{content[:32]}.safetensors"
    if path.is_file():
        try:
            return _read(path, content, engine, keys, options)
        except _UNREADABLE as error:
            logger.info("the index %s is built anew: %s", path, error)
    built = engine(keys, options)
    try:
        _keep(path, content, built)
    except _UNREADABLE as error:
        logger.warning("the index of %d keys is not kept, and will be built again: %s", len(keys), error)
    return built


def _read(
    path: Path, content: str, engine: type[SearchEngine], keys: StoredKeys, options: SearchOptions
) -> SearchEngine:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if file.metadata() != _metadata(content, tensors):  # what reads an index may not survive a bad one
            raise ValueError("it is not what its name says.")
    read = engine.of_tensors(keys, options, tensors)
    with suppress(OSError):  # where it may be read, but not changed
        os.utime(path)
    return read


def _content(engine: type[SearchEngine], keys: StoredKeys, options: SearchOptions) -> str:
    """What an index depends on, as a digest."""
    told = [keys.source, list(keys.codes.shape), engine.__name__, engine.version()]
    told += [getattr(options, name) for name in engine.index_options]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _keep(path: Path, content: str, built: SearchEngine) -> None:
    if tensors := built.tensors():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            tensors = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
            save_file(tensors, temporary, metadata=_metadata(content, tensors))
        _remove_unused(path.parent)


def _remove_unused(folder: Path) -> None:
    """Other processes may do so too, or still read: a file lives while it is open, and an index can be made again."""
    with suppress(OSError):
        for path in folder.glob("*.safetensors*"):  # and what is left of writing one
            if time.time() - path.stat().st_mtime > _UNUSED:
                path.unlink(missing_ok=True)


def _metadata(content: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """What an index of these tensors says of itself, as another's may lie under its name."""
    return {"content": content, "sha256": _digest(tensors)}


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(as_bytes(tensor).numpy())
    return digest.hexdigest()
