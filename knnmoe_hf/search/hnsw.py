"""Approximate search by hnswlib's graph, on the CPU; hits are scored again from the stored keys."""

import importlib.metadata
import tempfile
from pathlib import Path

import hnswlib
import numpy as np
import torch
from torch import Tensor

from knnmoe_hf.search.base import SLACK, Neighbors, SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.exact import TorchSearch
from knnmoe_hf.search.scores import rescore


class HnswSearch(SearchEngine):
    """
    A graph over float32 copies of the keys, built on one thread so that the same keys always give the same graph.

    Queries from another device travel to the host and back: use `search_backend="torch"` there.
    """

    index_options = ("hnsw_m", "hnsw_ef_construction")
    proposes = True

    def __init__(self, keys: StoredKeys, options: SearchOptions):
        super().__init__(keys.to("cpu"), options)
        rows, width = len(self.keys), self.keys.width
        self.index = hnswlib.Index(space="l2", dim=width)
        self.index.init_index(
            max_elements=rows, M=options.hnsw_m, ef_construction=options.hnsw_ef_construction, random_seed=100
        )
        self.options = options
        step = max(1, self.max_bytes // (4 * width))
        for start in range(0, rows, step):
            block = self.keys.floats(slice(start, start + step)).numpy()
            self.index.add_items(block, range(start, start + len(block)), num_threads=1)

    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        queries = queries.cpu()
        self.index.set_ef(max(self.options.hnsw_ef_search, fetch))
        try:
            labels, _ = self.index.knn_query(queries.numpy(), k=fetch, num_threads=torch.get_num_threads())
        except RuntimeError:  # the graph reaches fewer rows than are asked for
            return TorchSearch(self.keys, self.options).search(queries, k)
        return rescore(queries, self.keys, torch.from_numpy(labels.astype("int64")), k, self.max_bytes)

    def propose(self, query: np.ndarray, k: int) -> np.ndarray | None:
        fetch = min(k + SLACK, len(self.keys))
        self.index.set_ef(max(self.options.hnsw_ef_search, fetch))
        try:
            return self.index.knn_query(query, k=fetch, num_threads=1)[0][0].astype("int64")
        except RuntimeError:  # as in `_search`
            return None

    @classmethod
    def version(cls) -> str:
        return importlib.metadata.version("hnswlib")

    def tensors(self) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:  # hnswlib knows files alone
            path = Path(folder) / "index"
            self.index.save_index(str(path))
            return {"index": torch.from_numpy(np.fromfile(path, dtype=np.uint8))}

    @classmethod
    def of_tensors(cls, keys: StoredKeys, options: SearchOptions, tensors: dict[str, Tensor]) -> "HnswSearch":
        engine = cls.__new__(cls)
        SearchEngine.__init__(engine, keys.to("cpu"), options)
        engine.options = options
        engine.index = hnswlib.Index(space="l2", dim=keys.width)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index"
            tensors["index"].numpy().tofile(path)
            engine.index.load_index(str(path), max_elements=len(keys))
        if engine.index.get_current_count() != len(keys):
            raise ValueError(f"This index is not of {len(keys)} keys: build it anew.")
        return engine

    @property
    def nbytes(self) -> int:
        return self.index.index_file_size()
