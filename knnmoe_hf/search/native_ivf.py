"""Approximate search of long memories on the CPU by native code: an inverted file with exact distances."""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from knnmoe_hf import native
from knnmoe_hf.search.base import Neighbors, SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.lists import LEAST_SCAN, Lists, one_list_per_key, read_scan, scan_tensor, sort_into_lists
from knnmoe_hf.search.residual_codes import ResidualCodes4bit, residual_codes
from knnmoe_hf.search.tuning import SEQUENTIAL_READS, fit_max_scan, recall, sample_queries, tuned_for

logger = logging.getLogger(__name__)

_LEAST_SCAN_PER_KEY = 2**6  # keys to scan where each is a list of its own: centroids tell exactly where they are
_COPIED = 2**17  # rows for which int8 copies of the keys are kept as lists of their own, at most
_CODED = 2**19  # rows from which 4-bit codes make searches faster, see `NativeIvfSearch`
_LEAST_RERANK, _RERANK_PER_NEIGHBOR, _RERANK_MARGIN = 2**6, 4, 1.5
_LOST = 0.002  # recall of sampled queries that 4-bit codes may cost


class NativeIvfSearch(SearchEngine):
    """
    `search_backend="ivf"` on a CPU with native code: each key is in the list of its nearest centroid, and a query is
    compared exactly with the first `max_scan` keys of its nearest lists, as many as sampled queries needed.

    Where an eighth of all keys would have to be scanned, each key becomes a list of its own; if that does not help
    either, or the layer is too long for it, queries are compared with all keys.

    From 2**19 rows on, the scanned keys are first compared by 4-bit residual codes, and only the nearest `max_rerank`
    exactly. Random reads of a million keys are slow: codes made a single query on cold caches 1.7 times as fast, and a
    batch of 256 1.3 times. At 300,000 rows they made no difference, at 20,000 to 100,000 they cost a tenth.

    The keys stay where they are. The index takes 4 bytes a row, centroids some 3 more at 100,000 rows, and 4-bit codes
    half a byte for each dimension. A batch runs on PyTorch's OpenMP threads, on one thread in a forked process.

    Attributes:
        max_scan: keys that are scanned for a query.
        max_rerank: keys among them that get exact distances; `max_scan` without residual codes.
        lists, residual_codes: None where all keys are compared, or without 4-bit codes.
    """

    index_options = ("num_neighbors",)
    index_format = 2

    def __init__(self, keys: StoredKeys, options: SearchOptions, index: dict[str, Tensor] | None = None):
        super().__init__(keys, options)
        self._set_exhaustive()
        if index is None:
            self._fit(tuned_for(options))
        else:
            self._read(index)

    def _set_exhaustive(self) -> None:
        step = self.keys.step.float().contiguous() if self.keys.step is not None else None
        self.index = native.kernels.Index(self.keys.codes.contiguous(), step)
        self.lists = self.residual_codes = None
        self.max_scan = self.max_rerank = len(self.keys)

    def _set_lists(self, lists: Lists, codes: ResidualCodes4bit | None = None) -> None:
        self.index.set_lists(*lists, *(codes or (None, None)))
        self.lists, self.residual_codes = lists, codes

    def _set_scan(self, max_scan: int, max_rerank: int | None = None) -> None:
        self.max_scan, self.max_rerank = max_scan, max_rerank or max_scan
        self.index.set_scan(self.max_scan, self.max_rerank, tuned_for(self.options))

    def _fit(self, k: int) -> None:
        """Finds lists in which few keys have to be scanned for k neighbours; there are none if that takes many."""
        queries, rows = sample_queries(self.keys), len(self.keys)
        exact = self.search(queries, k)

        def scanning(max_scan: int) -> Neighbors:
            self._set_scan(max_scan)
            return self.search(queries, k)

        for lists, least in self._candidates():
            self._set_lists(lists)
            if (max_scan := fit_max_scan(scanning, exact, rows, least)) is not None:
                self._set_scan(max_scan)
                if rows >= _CODED:
                    self._fit_residual_codes(k, lambda: recall(self.search(queries, k), exact))
                return
        self._set_exhaustive()
        if rows > _COPIED:
            logger.warning(
                "%d keys do not cluster, or some of them lie very far from all others, so that each query is compared "
                "with all of them: build with max_rows for fewer",
                rows,
            )

    def _candidates(self) -> Iterator[tuple[Lists, int]]:
        """Lists to try, and how many keys to scan in them at least."""
        rows = len(self.keys)
        if rows // SEQUENTIAL_READS > LEAST_SCAN:
            yield sort_into_lists(self.keys), LEAST_SCAN
        if rows <= _COPIED:
            yield one_list_per_key(self.keys), _LEAST_SCAN_PER_KEY

    def _fit_residual_codes(self, k: int, measured: Callable[[], float]) -> None:
        """Adds 4-bit codes, if exact distances to half of the scanned keys or fewer keep the recall."""
        lists, max_scan, max_rerank = self.lists, self.max_scan, max(_LEAST_RERANK, _RERANK_PER_NEIGHBOR * k)
        if max_rerank > max_scan // 2:
            return
        least = measured() - _LOST
        self._set_lists(lists, residual_codes(self.keys, lists))
        while max_rerank <= max_scan // 2:
            self._set_scan(max_scan, max_rerank)
            if measured() >= least:
                return self._set_scan(max_scan, int(_RERANK_MARGIN * max_rerank))
            max_rerank *= 2
        self._set_lists(lists)
        self._set_scan(max_scan)

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        queries = queries.cpu().contiguous()
        distances = torch.empty(len(queries), k, dtype=torch.float32, device="cpu")
        rows = torch.empty(len(queries), k, dtype=torch.int64, device="cpu")
        self.index.search(
            native.address(queries, torch.float32),
            len(queries),
            k,
            native.address(distances, torch.float32),
            native.address(rows, torch.int64),
            torch.get_num_threads(),
        )
        return Neighbors(distances, rows)

    @property
    def nbytes(self) -> int:
        held = (*(self.lists or ()), *(self.residual_codes or ()))
        return sum(tensor.nbytes for tensor in held if tensor is not self.keys.codes) + self.index.bytes

    def tensors(self) -> dict[str, Tensor]:
        scan = {"scan": scan_tensor(self.max_scan, self.max_rerank, len(self.keys))}
        if self.lists is None or len(self.lists.centroids) == len(self.keys):
            return scan
        return scan | self.lists._asdict() | (self.residual_codes._asdict() if self.residual_codes else {})

    @classmethod
    def from_tensors(cls, keys: StoredKeys, options: SearchOptions, tensors: dict[str, Tensor]) -> "NativeIvfSearch":
        return cls(keys, options, tensors)

    def _read(self, index: dict[str, Tensor]) -> None:
        max_scan, max_rerank = read_scan(index, len(self.keys))
        lists, codes = None, None
        if index.keys() > {"scan"}:
            lists = Lists.from_tensors(index, self.keys)
        elif max_scan < len(self.keys):
            lists = one_list_per_key(self.keys)
        if max_rerank < max_scan:
            codes = ResidualCodes4bit.from_tensors(index, self.keys, lists)
        elif index.keys() & set(ResidualCodes4bit._fields):
            raise ValueError("this index has residual codes that its max_rerank does not use: build it anew.")
        if lists is not None:
            self._set_lists(lists, codes)
            self._set_scan(max_scan, max_rerank)
