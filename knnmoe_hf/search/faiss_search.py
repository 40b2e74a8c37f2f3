"""Approximate search by faiss's inverted file of product codes, on the CPU; hits are scored again."""

import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.search.base import Neighbors, SearchEngine, StoredKeys, recall, rescore, sample_rows
from knnmoe_hf.search.torch_search import TorchSearch

_POINTS = 40  # keys per list that its centre is fitted to
_ITERATIONS = 10
_DIMENSIONS = 2  # of a key for each code of four bits
_CANDIDATES = 3  # times k, found by their codes and scored again
_TARGET = 0.99  # share of their neighbours that sampled keys must find
_PART = 64  # queries that are worth a thread
_CALL = 16  # queries of one call: from 20 on, faiss ranks lists by a matrix product, which rounds otherwise


class FaissSearch(SearchEngine):
    """
    Keys in lists of such as lie near each other, by four bits for each pair of dimensions; a query looks into the
    lists that are nearest to it, as many as find 0.99 of the neighbours of sampled keys.

    Built on one thread, so that the same keys always give the same index. 24 bytes a row at 48 dimensions.
    """

    least_rows = 1024

    def __init__(self, keys: StoredKeys, config: KNNMoEConfig):
        super().__init__(keys.to("cpu"), config)
        import faiss

        width = keys.width + keys.width % _DIMENSIONS
        lists = 2 ** round(math.log2(4 * math.sqrt(len(keys))))
        self.index = faiss.index_factory(width, f"IVF{lists},PQ{width // _DIMENSIONS}x4fs")
        for fitted in (self.index.cp, self.index.pq.cp):
            fitted.min_points_per_centroid = 1  # few keys are no reason for a warning
        self.index.cp.niter, self.index.cp.max_points_per_centroid = _ITERATIONS, _POINTS
        with _one_thread():
            every = max(1, len(keys) // (_POINTS * lists))
            self.index.train(self._padded(self.keys.floats(slice(None, None, every))))
            step = max(1, self.max_bytes // (4 * width))
            for start in range(0, len(keys), step):
                self.index.add(self._padded(self.keys.floats(slice(start, start + step))))
        self._begin(config)
        self._fit_lists()

    def _begin(self, config: KNNMoEConfig) -> None:
        self.config = config
        self.index.implem = 10  # one query after the other, so that an answer does not depend on who else asks

    def _padded(self, table: Tensor) -> np.ndarray:
        missing = self.index.d - table.shape[1]
        return (F.pad(table, (0, missing)) if missing else table.contiguous()).numpy()

    def _fit_lists(self) -> None:
        queries = self.keys.floats(sample_rows(len(self.keys)))
        k = self.config.num_neighbors + 1  # a key finds itself
        wanted, lists = TorchSearch(self.keys, self.config).search(queries, k), self.index.nlist
        for nprobe in sorted({min(round(2 ** (n / 2)), lists) for n in range(4, 2 * lists.bit_length() + 1)}):
            self.index.nprobe = nprobe
            if recall(self.search(queries, k), wanted) >= _TARGET:
                break

    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        queries = queries.cpu()
        labels = self._candidates(self._padded(queries), min(max(fetch, _CANDIDATES * k), len(self.keys)))
        few = labels[:, -1] < 0  # as the lists that were looked into hold no more
        if few.any():
            labels[few] = np.arange(labels.shape[1])
        found = rescore(queries, self.keys, torch.from_numpy(labels), k, self.max_bytes)
        if few.any():
            exact = TorchSearch(self.keys, self.config).search(queries[few], k)
            for table, better in zip(found, exact):
                table[torch.from_numpy(few)] = better
        return found

    def _candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """(T, count) int64, -1 where the lists hold no more."""
        parts = min(len(queries) // _PART, torch.get_num_threads())
        with _one_thread():
            if parts < 2:
                return self._labels(queries, count)
            mine, *others = np.array_split(queries, parts)
            asked = [_workers().submit(self._labels, part, count) for part in others]
            return np.concatenate([self._labels(mine, count), *(part.result() for part in asked)])

    def _labels(self, queries: np.ndarray, count: int) -> np.ndarray:
        if len(queries) <= _CALL:
            return self.index.search(queries, count)[1]
        calls = range(0, len(queries), _CALL)
        return np.concatenate([self.index.search(queries[start : start + _CALL], count)[1] for start in calls])

    def tensors(self) -> dict[str, Tensor]:
        import faiss

        return {"index": torch.from_numpy(faiss.serialize_index(self.index))}

    @classmethod
    def of_tensors(cls, keys: StoredKeys, config: KNNMoEConfig, tensors: dict[str, Tensor]) -> "FaissSearch":
        import faiss

        engine = cls.__new__(cls)
        SearchEngine.__init__(engine, keys.to("cpu"), config)
        engine.index = faiss.deserialize_index(tensors["index"].numpy())
        engine._begin(config)
        return engine

    @property
    def nbytes(self) -> int:
        sizes = (self.index.invlists.list_size(i) for i in range(self.index.nlist))
        padded = sum(-(-size // self.index.bbs) * self.index.bbs for size in sizes)  # codes lie in blocks
        rows = padded * self.index.code_size + 8 * len(self.keys)
        return rows + 4 * self.index.nlist * self.index.d + 4 * self.index.pq.centroids.size()


@contextmanager
def _one_thread() -> Iterator[None]:
    """
    Inside, this thread's faiss runs on it alone.

    faiss has a pool of OpenMP threads of its own; it and PyTorch's, each as large as the machine, take each other's
    cores, and a search of 50 microseconds then takes milliseconds.
    """
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@functools.cache
def _workers() -> ThreadPoolExecutor:
    """Threads that wait for their part of a batch without taking a core."""
    import faiss

    return ThreadPoolExecutor(os.cpu_count(), "knnmoe-faiss", initializer=lambda: faiss.omp_set_num_threads(1))


os.register_at_fork(after_in_child=_workers.cache_clear)  # its threads do not live on in a forked process
