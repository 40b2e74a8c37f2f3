"""Nearest rows of a layer's keys. A new engine is one file and one entry here."""

import functools
import logging
import weakref

from knnmoe_hf import native
from knnmoe_hf.search.auto import choose
from knnmoe_hf.search.base import Neighbors, SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.exact import TorchSearch
from knnmoe_hf.search.faiss import FaissSearch, faiss_installed
from knnmoe_hf.search.hnsw import HnswSearch
from knnmoe_hf.search.index_cache import load_or_build
from knnmoe_hf.search.ivf import IvfSearch
from knnmoe_hf.search.native_ivf import NativeIvfSearch

logger = logging.getLogger(__name__)

ENGINES: dict[str, type[SearchEngine]] = {
    "torch": TorchSearch,
    "hnsw": HnswSearch,
    "faiss": FaissSearch,
    "ivf": IvfSearch,
}


def build_engine(keys: StoredKeys, options: SearchOptions) -> SearchEngine:
    """
    The engine that `options.search_backend` names, over a layer's keys; the same one as long as it is in use.

    Raises:
        ImportError: for `"faiss"` where it is not installed.
    """
    name, reason = options.search_backend, "it was asked for"
    if name == "auto":
        name, reason = choose(keys)
    if name == "faiss" and not faiss_installed():
        raise ImportError(
            "search_backend='faiss' needs faiss, which is not here: pip install 'knnmoe_hf[faiss]', or use 'auto'."
        )
    engine = ENGINES[name]
    if engine is IvfSearch and native.on(keys.codes.device) is not None:
        engine = NativeIvfSearch  # the same lists, looked into by compiled code
    if len(keys) < engine.least_rows:
        engine, reason = TorchSearch, f"fewer than {engine.least_rows} rows are searched exactly"
    log_once(options.search_backend, engine.__name__, reason)
    read = ("search_max_bytes", "hnsw_ef_search", *engine.index_options)
    known = (id(keys.codes), engine, *(getattr(options, name) for name in read))
    built = _alive.get(known)
    if built is None or built.keys.codes is not keys.codes:
        _alive[known] = built = load_or_build(engine, keys, options)
    return built


_alive: weakref.WeakValueDictionary[tuple, SearchEngine] = weakref.WeakValueDictionary()  # by keys and options


@functools.cache
def log_once(*said: str) -> None:
    """Says it once, not for each layer."""
    logger.info("search_backend=%r: %s, as %s", *said)


__all__ = ["ENGINES", "Neighbors", "SearchEngine", "StoredKeys", "build_engine"]
