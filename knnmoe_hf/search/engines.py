"""The engines by name, and the one that `search_backend` names, made for a layer's keys."""

import functools
import importlib
import logging
import weakref

from knnmoe_hf import native
from knnmoe_hf.search.auto import choose
from knnmoe_hf.search.base import SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.index_cache import load_or_build

logger = logging.getLogger(__name__)

ENGINES = {
    "torch": "exact.TorchSearch",
    "ivf": "ivf.IvfSearch",
    "native_ivf": "native_ivf.NativeIvfSearch",
    "hnsw": "hnsw.HnswSearch",
    "faiss": "faiss.FaissSearch",
}
"""Module and class of each engine. `search_backend="ivf"` means `native_ivf` on a CPU with native code."""


def engine_class(name: str) -> type[SearchEngine]:
    """
    The class of an engine, imported now.

    Args:
        name: a key of `ENGINES`.

    Raises:
        ImportError: if the library that the engine wraps is not installed.
    """
    module, _, cls = ENGINES[name].partition(".")
    try:
        return getattr(importlib.import_module(f"knnmoe_hf.search.{module}"), cls)
    except ImportError as error:
        raise ImportError(
            f"search_backend={name!r} needs a library that cannot be imported ({error}): "
            f"pip install '{_LIBRARIES.get(name, name)}', or use search_backend='auto'."
        ) from error


def build_engine(keys: StoredKeys, options: SearchOptions) -> SearchEngine:
    """
    The engine that `options.search_backend` names, over a layer's keys.

    An index is read from the cache on disk if it is there (`index_cache`), and an engine that is still alive in this
    process is shared by all lookups over the same tensor with the same options.

    Args:
        keys: of N rows, N at least 1, on the device where lookups run.
        options: which engine, and its options.

    Raises:
        ImportError: if the library that the engine wraps is not installed.
    """
    name, reason = options.search_backend, "as asked for"
    if name == "auto":
        name, reason = choose(keys)
    if name == "ivf" and native.on(keys.codes.device) is not None:
        name = "native_ivf"
    engine = engine_class(name)
    if len(keys) < engine.least_rows:
        reason = f"{engine.__name__} is for at least {engine.least_rows:,} rows"
        engine = engine_class("torch")
    log_once(options.search_backend, engine.__name__, reason)
    relevant = ("search_max_bytes", "hnsw_ef_search", *engine.index_options)
    known = (id(keys.codes), engine, *(getattr(options, option) for option in relevant))
    built = _alive.get(known)
    if built is None or built.keys.codes is not keys.codes:
        _alive[known] = built = load_or_build(engine, keys, options)
    return built


_LIBRARIES = {"faiss": "knnmoe_hf[faiss]", "hnsw": "hnswlib"}
_alive: weakref.WeakValueDictionary[tuple, SearchEngine] = weakref.WeakValueDictionary()


@functools.cache
def log_once(backend: str, engine: str, reason: str) -> None:
    """Logs an engine and the reason for it once in a process, not for each layer."""
    logger.info("search_backend=%r uses %s: %s", backend, engine, reason)
