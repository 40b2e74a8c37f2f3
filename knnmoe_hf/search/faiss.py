"""Approximate search by faiss's inverted file of product codes, on the CPU; hits are scored again."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf.search.base import SLACK, Neighbors, SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.exact import TorchSearch
from knnmoe_hf.search.reach import FEWEST, sample_queries, share_found
from knnmoe_hf.search.scores import rescore
from knnmoe_hf.search.workers import in_parts

logger = logging.getLogger(__name__)

_POINTS = 40  # keys per list that its centre is fitted to
_ITERATIONS = 10
_CODES = 64  # codes of four bits in a row, at most: one for each dimension of most keys
_TARGET = 0.99  # share of their neighbours that sampled queries must find
_LISTS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)  # to look into
_CANDIDATES = (2, 3, 4, 6, 8, 12, 16, 24)  # times k, found by their codes and scored again
_RESCORING = 28  # what it costs to score a candidate again, in keys that a list is longer
_PART = 64  # queries that are worth a thread
_CALL = 16  # queries of one call: from 20 on, faiss ranks lists by a matrix product, which rounds otherwise


class FaissSearch(SearchEngine):
    """
    Keys in lists of such as lie near each other, by four bits for each dimension; a query looks into the lists that
    are nearest to it. How many, and how many of the keys found there are scored again, is the least costly that finds
    0.99 of the neighbours of sampled queries.

    Built on one thread, so that the same keys always give the same index. Some 38 bytes a row at 48 dimensions.
    """

    least_rows = 1024
    index_options = ("num_neighbors",)
    proposes = True

    def __init__(self, keys: StoredKeys, options: SearchOptions):
        super().__init__(keys.to("cpu"), options)
        import faiss

        grouped = -(-keys.width // _CODES)  # dimensions of one code
        codes = -(-keys.width // grouped)
        lists = 2 ** round(math.log2(2 * math.sqrt(len(keys))))
        self.index = faiss.index_factory(width := codes * grouped, f"IVF{lists},PQ{codes}x4fs")
        for fitted in (self.index.cp, self.index.pq.cp):
            fitted.min_points_per_centroid = 1  # few keys are no reason for a warning
        self.index.cp.niter, self.index.cp.max_points_per_centroid = _ITERATIONS, _POINTS
        with _one_thread():
            every = max(1, len(keys) // (_POINTS * lists))
            self.index.train(self._padded(self.keys.floats(slice(None, None, every))))
            step = max(1, self.max_bytes // (4 * width))
            for start in range(0, len(keys), step):
                self.index.add(self._padded(self.keys.floats(slice(start, start + step))))
        self._begin(options)
        self._fit_reach()

    def _begin(self, options: SearchOptions) -> None:
        self.options, self.candidates = options, _CANDIDATES[0]
        self.index.implem = 11  # one query after the other, so that an answer does not depend on who else asks

    def _padded(self, table: Tensor) -> np.ndarray:
        missing = self.index.d - table.shape[1]
        return (F.pad(table, (0, missing)) if missing else table.contiguous()).numpy()

    def _fit_reach(self) -> None:
        """The least costly number of lists and candidates that is enough, or the most there is."""
        queries, k = sample_queries(self.keys), max(self.options.num_neighbors, FEWEST)
        wanted, lists = TorchSearch(self.keys, self.options).search(queries, k), self.index.nlist
        length = len(self.keys) / lists
        reaches = [(probed, times) for probed in _LISTS if probed < 2 * lists for times in _CANDIDATES]
        for probed, times in sorted(reaches, key=lambda reach: reach[0] * length + _RESCORING * reach[1] * k):
            self.index.nprobe, self.candidates = probed, times
            if (found := share_found(self.search(queries, k), wanted)) >= _TARGET:
                return
        logger.warning("%d keys have no lists worth the name: %.2f of the neighbours are found", len(self.keys), found)

    def propose(self, query: np.ndarray, k: int) -> np.ndarray | None:
        missing = self.index.d - query.shape[1]
        padded = np.pad(query, ((0, 0), (0, missing))) if missing else query
        labels = self.index.search(padded, self._count(k))[1][0]
        return labels if labels[-1] >= 0 else None  # the lists may hold fewer

    def _count(self, k: int) -> int:
        """Candidates of a query."""
        return min(max(k + SLACK, self.candidates * max(k, FEWEST)), len(self.keys))

    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        queries = queries.cpu()
        labels = self._candidates(self._padded(queries), self._count(k))
        few = labels[:, -1] < 0  # as the lists that were looked into hold no more
        if few.any():
            labels[few] = np.arange(labels.shape[1])
        found = rescore(queries, self.keys, torch.from_numpy(labels), k, self.max_bytes)
        if few.any():
            exact = TorchSearch(self.keys, self.options).search(queries[few], k)
            for table, better in zip(found, exact):
                table[torch.from_numpy(few)] = better
        return found

    def _candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """(T, count) int64, -1 where the lists hold no more."""

        def ask(part: slice) -> np.ndarray:
            with _one_thread():
                return self._labels(queries[part], count)

        return np.concatenate(in_parts(ask, len(queries), _PART))

    def _labels(self, queries: np.ndarray, count: int) -> np.ndarray:
        if len(queries) <= _CALL:
            return self.index.search(queries, count)[1]
        calls = range(0, len(queries), _CALL)
        return np.concatenate([self.index.search(queries[start : start + _CALL], count)[1] for start in calls])

    @classmethod
    def version(cls) -> str:
        import faiss

        return faiss.__version__

    def tensors(self) -> dict[str, Tensor]:
        import faiss

        index = torch.from_numpy(faiss.serialize_index(self.index))
        return {"index": index, "candidates": torch.tensor([self.candidates])}

    @classmethod
    def of_tensors(cls, keys: StoredKeys, options: SearchOptions, tensors: dict[str, Tensor]) -> "FaissSearch":
        import faiss

        engine = cls.__new__(cls)
        SearchEngine.__init__(engine, keys.to("cpu"), options)
        engine.index = faiss.deserialize_index(tensors["index"].numpy())
        if engine.index.ntotal != len(keys):
            raise ValueError(f"This index is not of {len(keys)} keys: build it anew.")
        engine._begin(options)
        engine.candidates = int(tensors["candidates"])
        return engine

    @property
    def nbytes(self) -> int:
        sizes = (self.index.invlists.list_size(i) for i in range(self.index.nlist))
        padded = sum(-(-size // self.index.bbs) * self.index.bbs for size in sizes)  # codes lie in blocks
        rows = padded * self.index.code_size + 8 * len(self.keys)
        return rows + 4 * self.index.nlist * self.index.d + 4 * self.index.pq.centroids.size()


def faiss_installed() -> bool:
    """Whether there is a faiss to be used, of whatever distribution."""
    try:
        import faiss
    except ImportError:
        return False
    return hasattr(faiss, "index_factory")  # a folder of that name has none


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
