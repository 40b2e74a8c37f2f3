"""Nearest rows of a layer's keys. A new engine is one file and one entry here."""

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.search.base import Neighbors, SearchEngine, StoredKeys
from knnmoe_hf.search.faiss_search import FaissSearch
from knnmoe_hf.search.hnsw import HnswSearch
from knnmoe_hf.search.ivf import IvfSearch
from knnmoe_hf.search.torch_search import TorchSearch

ENGINES: dict[str, type[SearchEngine]] = {
    "torch": TorchSearch,
    "hnsw": HnswSearch,
    "faiss": FaissSearch,
    "ivf": IvfSearch,
}


def build_engine(keys: StoredKeys, config: KNNMoEConfig) -> SearchEngine:
    """The engine that `config.search_backend` names, over a layer's keys."""
    engine = ENGINES[config.search_backend]
    return (engine if len(keys) >= engine.least_rows else TorchSearch)(keys, config)


__all__ = ["ENGINES", "Neighbors", "SearchEngine", "StoredKeys", "build_engine"]
