"""Indexes of memories that lie on disk, kept in the library's cache directory, never in the memory's own folder."""

import hashlib
import importlib.metadata
import json
import logging
import os
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.files import cache_dir
from knnmoe_hf.search.base import SearchEngine, StoredKeys
from knnmoe_hf.version import __version__

logger = logging.getLogger(__name__)

_OPTIONS = ("num_neighbors", "hnsw_m", "hnsw_ef_construction")


def load_or_build(engine: type[SearchEngine], keys: StoredKeys, config: KNNMoEConfig) -> SearchEngine:
    """
    The engine from its cached index, if that is of these very keys; else built, and cached if they lie on disk.

    There is one file for each engine and place of keys, so an index that is stale is replaced.
    """
    if keys.source is None:
        return engine(keys, config)
    place = hashlib.sha256(f"{keys.source.place} {engine.__name__}".encode()).hexdigest()[:32]
    path, content = cache_dir() / "indexes" / f"{place}.safetensors", _content(engine, keys, config)
    with suppress(OSError, SafetensorError, ValueError, KeyError, RuntimeError):  # none yet, or none that can be read
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("content") == content:
                return engine.of_tensors(keys, config, {name: file.get_tensor(name) for name in file.keys()})
    built = engine(keys, config)
    if tensors := built.tensors():
        _keep(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, content)
    return built


def _content(engine: type[SearchEngine], keys: StoredKeys, config: KNNMoEConfig) -> str:
    """What an index depends on, as a digest."""
    version = importlib.metadata.version(engine.package) if engine.package is not None else None
    told = [keys.source.digest, list(keys.codes.shape), engine.__name__, version, __version__]
    told += [getattr(config, name) for name in _OPTIONS]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _keep(path: Path, tensors: dict, content: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"content": content})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        logger.warning("the index of %d rows is not kept, and will be built again: %s", len(tensors), error)
