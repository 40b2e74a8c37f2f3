"""Approximate search by faiss's inverted file, on the CPU."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import numpy as np
import torch
from faiss import index_factory  # not there in a mere folder of that name
from torch import Tensor

from knnmoe_hf.search.base import Neighbors, SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.exact import TorchSearch
from knnmoe_hf.search.lists import check_row_count
from knnmoe_hf.search.scores import rescore
from knnmoe_hf.search.tuning import SEQUENTIAL_READS, effort_for, fit_max_scan, sample_queries, tuned_for

logger = logging.getLogger(__name__)

# bfloat16 keys as float32: where a processor has such instructions, SQbf16 rounds the queries to bfloat16 as well
_CODECS = {torch.float32: "Flat", torch.float16: "SQfp16", torch.bfloat16: "Flat", torch.int8: "SQ8"}
_PER_SQRT = 4  # lists for each square root of the rows
_LEAST_SCAN = 768  # keys to scan for a query, at least: more than for `NativeIvfSearch`, whose lists are shorter
_POINTS, _ITERATIONS = 40, 10  # k-means: sampled keys for each list, and iterations
_QUERIES_PER_THREAD = 16  # from 20 on, faiss ranks lists by a matrix product, whose rounding depends on its shape


class FaissSearch(SearchEngine):
    """
    `IVF...,SQ8` for int8 keys, `SQfp16` for float16, `Flat` for float32 and bfloat16.

    faiss stores the keys without loss, in its own copy, so that its distances are those of the keys. The number of
    lists that a query probes is fitted as for the other inverted files (`fit_max_scan`). 58 bytes a row at 48
    dimensions of int8.

    Built on one thread, so that the same keys always give the same index. A batch runs on faiss's OpenMP threads, as
    many as PyTorch has; on one in a forked process, where they are missing.
    """

    least_rows = 1024
    index_options = ("num_neighbors",)
    index_format = 3

    def __init__(self, keys: StoredKeys, options: SearchOptions):
        super().__init__(keys.to("cpu"), options)
        rows, width = len(self.keys), self.keys.width
        check_row_count(rows)
        lists = 2 ** round(math.log2(_PER_SQRT * math.sqrt(rows)))
        self.index = index_factory(width, f"IVF{lists},{_CODECS[keys.codes.dtype]}")
        clustering = self.index.cp
        clustering.niter, clustering.min_points_per_centroid = _ITERATIONS, 1  # few keys are no reason for a warning
        clustering.max_points_per_centroid = _POINTS
        with _threads(1):
            every = max(1, rows // (_POINTS * lists))
            if _CODECS[keys.codes.dtype] != "Flat":
                self.index.by_residual = False  # the keys themselves are coded, not their distance from a centroid
            self.index.train(self.keys.floats(slice(None, None, every)).contiguous().numpy())
            if keys.codes.dtype == torch.int8:
                self._set_steps()
            step = max(1, self.max_bytes // (4 * width))
            for start in range(0, rows, step):
                self.index.add(self.keys.floats(slice(start, start + step)).contiguous().numpy())
        self._fit()

    def _set_steps(self) -> None:
        """
        Makes SQ8 store int8 keys without loss.

        It codes x as `c = floor(255 * (x - low) / span)` and reads it as `low + span * (c + 0.5) / 255`. With a span
        of 255 steps from -128.5 steps on, each multiple of the step from -128 to 127 is the middle of an interval.
        """
        step = self.keys.step if self.keys.step is not None else torch.ones(self.keys.width)
        low, span = -128.5 * step.double(), 255 * step.double()
        faiss.copy_array_to_vector(torch.cat([low, span]).float().numpy(), self.index.sq.trained)

    def _fit(self) -> None:
        queries, k = sample_queries(self.keys), tuned_for(self.options)
        exact = TorchSearch(self.keys, self.options).search(queries, k)
        rows, lists = len(self.keys), self.index.nlist

        def scanning(max_scan: int) -> Neighbors:
            self.index.nprobe = -(-max_scan * lists // rows)
            return rescore(queries, self.keys, self.search(queries, k).rows, k, self.max_bytes)  # rounded as `exact`

        max_scan = fit_max_scan(scanning, exact, rows, _LEAST_SCAN)
        self.index.nprobe = min(lists, -(-(max_scan or rows) * lists // rows))
        if max_scan is None and rows // SEQUENTIAL_READS > _LEAST_SCAN:
            logger.warning(
                "%d keys do not cluster, so that each query is compared with all of them: search_backend='torch' is "
                "faster",
                rows,
            )

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        distances, rows = self._ask(queries.cpu().numpy(), k)
        found = Neighbors(torch.from_numpy(distances), torch.from_numpy(rows))
        # -1 where the probed lists hold fewer than k rows, or a query is not finite
        last = rows[0, -1] if len(rows) == 1 else rows[:, -1].min(initial=0)  # min takes a tenth of a search
        if last < 0:
            mask = found.rows[:, -1] < 0
            for table, exact in zip(found, TorchSearch(self.keys, self.options).search(queries[mask], k)):
                table[mask] = exact
        return found

    def _ask(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        nprobe = min(effort_for(k, self.index.nprobe, self.options), self.index.nlist)
        how = {} if nprobe == self.index.nprobe else {"params": faiss.SearchParametersIVF(nprobe=nprobe)}
        if len(queries) == 1:
            return self.index.search(queries, k, **how)
        threads = 1 if _forked else max(1, min(torch.get_num_threads(), len(queries) // _QUERIES_PER_THREAD))
        size = threads * _QUERIES_PER_THREAD
        with _threads(threads):
            parts = [self.index.search(queries[at : at + size], k, **how) for at in range(0, len(queries), size)]
        return tuple(np.concatenate(tables) for tables in zip(*parts)) if parts else self.index.search(queries, k)

    @classmethod
    def index_version(cls) -> str:
        return f"{cls.index_format}, faiss {faiss.__version__}"

    def tensors(self) -> dict[str, Tensor]:
        return {"index": torch.from_numpy(faiss.serialize_index(self.index))}

    @classmethod
    def from_tensors(cls, keys: StoredKeys, options: SearchOptions, tensors: dict[str, Tensor]) -> "FaissSearch":
        engine = cls.__new__(cls)
        SearchEngine.__init__(engine, keys.to("cpu"), options)
        engine.index = faiss.deserialize_index(tensors["index"].numpy())
        if engine.index.ntotal != len(keys) or engine.index.d != keys.width:
            raise ValueError(f"this index is not of {len(keys)} keys of {keys.width} dimensions: build it anew.")
        return engine

    @property
    def nbytes(self) -> int:
        return len(self.keys) * (self.index.code_size + 8) + 4 * self.index.nlist * self.index.d


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside, faiss runs this thread's calls on so many threads."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


_forked = False  # OpenMP threads of the parent do not exist in a forked process, which would wait for them for ever


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
