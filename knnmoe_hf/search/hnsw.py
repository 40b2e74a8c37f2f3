"""Approximate search by hnswlib's graph, on the CPU."""

import importlib.metadata
import tempfile
from pathlib import Path

import hnswlib
import numpy as np
import torch
from torch import Tensor

from knnmoe_hf.search.base import Neighbors, SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.exact import TorchSearch
from knnmoe_hf.search.tuning import effort_for


class HnswSearch(SearchEngine):
    """
    A graph over float32 copies of the keys, so that hnswlib's distances are those of the keys.

    Built on one thread, so that the same keys always give the same graph. Queries from another device travel to the
    host and back: use `search_backend="torch"` there.
    """

    index_options = ("hnsw_m", "hnsw_ef_construction")

    def __init__(self, keys: StoredKeys, options: SearchOptions):
        super().__init__(keys.to("cpu"), options)
        rows, width = len(self.keys), self.keys.width
        self.index = hnswlib.Index(space="l2", dim=width)
        self.index.init_index(
            max_elements=rows, M=options.hnsw_m, ef_construction=options.hnsw_ef_construction, random_seed=100
        )
        step = max(1, self.max_bytes // (4 * width))
        for start in range(0, rows, step):
            block = self.keys.floats(slice(start, start + step)).numpy()
            self.index.add_items(block, range(start, start + len(block)), num_threads=1)

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        queries = queries.cpu()
        self.index.set_ef(max(effort_for(k, self.options.hnsw_ef_search, self.options), k))
        try:
            rows, distances = self.index.knn_query(queries.numpy(), k=k, num_threads=torch.get_num_threads())
        except RuntimeError:  # the graph connects too few rows to one of the queries
            if len(queries) > 1:
                parts = [self._search(query, k) for query in queries.split(1)]
                return Neighbors(*(torch.cat(tables) for tables in zip(*parts)))
            return TorchSearch(self.keys, self.options).search(queries, k)
        distances = np.fmin(distances, np.inf, out=distances)  # NaN becomes inf
        return Neighbors(torch.from_numpy(distances), torch.from_numpy(rows.view(np.int64)))

    @classmethod
    def index_version(cls) -> str:
        return f"{cls.index_format}, hnswlib {importlib.metadata.version('hnswlib')}"

    def tensors(self) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:  # hnswlib writes files only
            path = Path(folder) / "index"
            self.index.save_index(str(path))
            return {"index": torch.from_numpy(np.fromfile(path, dtype=np.uint8))}

    @classmethod
    def from_tensors(cls, keys: StoredKeys, options: SearchOptions, tensors: dict[str, Tensor]) -> "HnswSearch":
        engine = cls.__new__(cls)
        SearchEngine.__init__(engine, keys.to("cpu"), options)
        engine.index = hnswlib.Index(space="l2", dim=keys.width)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index"
            tensors["index"].numpy().tofile(path)
            engine.index.load_index(str(path), max_elements=len(keys))
        if engine.index.get_current_count() != len(keys):
            raise ValueError(f"this index is not of {len(keys)} keys: build it anew.")
        return engine

    @property
    def nbytes(self) -> int:
        return self.index.index_file_size()
