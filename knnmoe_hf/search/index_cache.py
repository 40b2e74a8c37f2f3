"""Indexes of memories that lie on disk, kept in the library's cache directory, never in the memory's own folder."""

import hashlib
import json
import logging
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.files import cache_dir, replacing
from knnmoe_hf.search.base import SearchEngine, StoredKeys
from knnmoe_hf.tables import as_bytes

logger = logging.getLogger(__name__)

_UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, RuntimeError)  # RuntimeError is what engines raise


def load_or_build(engine: type[SearchEngine], keys: StoredKeys, config: KNNMoEConfig) -> SearchEngine:
    """
    The engine from its cached index, if there is one of these very keys; else built, and cached if they lie on disk.

    An index is named by all that it depends on, so that one that is stale is never found.
    """
    if keys.source is None:
        return engine(keys, config)
    path = cache_dir() / "indexes" / f"{_content(engine, keys, config)}.safetensors"
    with suppress(*_UNREADABLE), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if (file.metadata() or {}).get("sha256") == _digest(tensors):  # what reads an index may not survive a bad one
            return engine.of_tensors(keys, config, tensors)
    built = engine(keys, config)
    try:
        _keep(path, built)
    except _UNREADABLE as error:
        logger.warning("the index of %d keys is not kept, and will be built again: %s", len(keys), error)
    return built


def _content(engine: type[SearchEngine], keys: StoredKeys, config: KNNMoEConfig) -> str:
    """What an index depends on, as a digest."""
    told = [keys.source, list(keys.codes.shape), engine.__name__, engine.version()]
    told += [getattr(config, name) for name in engine.index_options]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def _keep(path: Path, built: SearchEngine) -> None:
    if tensors := built.tensors():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            tensors = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
            save_file(tensors, temporary, metadata={"sha256": _digest(tensors)})


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(as_bytes(tensor).numpy())
    return digest.hexdigest()
