"""Indexes of memories that lie on disk, kept in the library's cache directory, never in the memory's own folder."""

import hashlib
import json
import logging
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.files import cache_dir, replacing
from knnmoe_hf.search.base import SearchEngine, StoredKeys

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
        return engine.of_tensors(keys, config, {name: file.get_tensor(name) for name in file.keys()})
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
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
