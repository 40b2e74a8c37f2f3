"""Approximate search of long memories on any device: an inverted file in torch."""

import torch
from torch import Tensor

from knnmoe_hf.search.base import SLACK, Neighbors, SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.exact import TorchSearch
from knnmoe_hf.search.lists import LEAST_SCAN, Lists, read_scan, scan_tensor, sort_into_lists
from knnmoe_hf.search.scores import CACHE_BYTES, autocast_off, in_blocks, rescore
from knnmoe_hf.search.tuning import SEQUENTIAL_READS, effort_for, fit_max_scan, sample_queries, tuned_for

_SCANNED_PER_CANDIDATE = 4


class IvfSearch(SearchEngine):
    """
    `search_backend="ivf"` on accelerators, and on a CPU without native code: the lists of `NativeIvfSearch`, in which
    a query scans as many keys.

    Where an eighth of all keys would have to be scanned, all are compared exactly.

    Shapes depend on the number of queries only, and nothing branches on data: a query reads its `nprobe` nearest
    lists, which held `max_scan` keys or more for every sampled query, and of these the first `max_scan`. Centroids are
    int8 and queries are rounded to as few digits for their ranking, so that products of any shape rank lists alike.
    The index takes 8 bytes a row, centroids some 8 more at 100,000 rows.

    Attributes:
        max_scan: keys that are scanned for a query.
        nprobe: lists that are read for a query.
    """

    traceable = True
    index_options = ("num_neighbors",)
    index_format = 2

    def __init__(self, keys: StoredKeys, options: SearchOptions, index: dict[str, Tensor] | None = None):
        super().__init__(keys, options)
        on_cpu = keys.codes.device.type == "cpu"
        self.block_bytes = min(self.max_bytes, CACHE_BYTES) if on_cpu else self.max_bytes
        self.exact: TorchSearch | None = None  # made only where all keys are compared
        self.max_scan, self.lists = len(keys), None
        if index is None:
            self._fit(tuned_for(options))
        else:
            max_scan, _ = read_scan(index, len(keys))
            if max_scan < len(keys):
                self._set_lists(Lists.from_tensors(index, keys))
                self._set_scan(max_scan)
        if self.lists is None:
            self.exact = TorchSearch(keys, options)
            self.traceable = self.exact.traceable

    def _set_lists(self, lists: Lists) -> None:
        self.lists, self.starts, self.sizes = lists, lists.starts[:-1].long(), lists.sizes
        floats = lists.centroids.float()
        self.table = floats.T.contiguous()  # (c, L)
        self.centroid_norms = (floats * lists.step).square().sum(dim=-1) / 2
        self.smallest = self.sizes.sort().values.cumsum(0).tolist()  # rows in any 1, 2, ... lists, at least
        parts = lists.rows.long().split(max(1, self.max_bytes // (4 * self.keys.width)))
        self.half_norms = torch.cat([self.keys.floats(part).square().sum(dim=-1) / 2 for part in parts])  # by list

    def _set_scan(self, max_scan: int) -> None:
        self.max_scan, lists = max_scan, len(self.sizes)
        held = self.sizes[self._nearest_lists(sample_queries(self.keys), lists)].cumsum(dim=-1)  # (S, L)
        self.nprobe = min(lists, int((held < max_scan).sum(dim=-1).max()) + 1)

    def _fit(self, k: int) -> None:
        """Finds how many keys have to be scanned for k neighbours; all if that is many."""
        rows = len(self.keys)
        if rows // SEQUENTIAL_READS <= LEAST_SCAN:
            return
        queries = sample_queries(self.keys)
        exact = TorchSearch(self.keys, self.options).search(queries, k)
        self._set_lists(sort_into_lists(self.keys))

        def scanning(max_scan: int) -> Neighbors:
            self._set_scan(max_scan)
            return self._search_lists(queries, min(k, rows))

        max_scan = fit_max_scan(scanning, exact, rows, LEAST_SCAN)
        if max_scan is None:
            self.max_scan, self.lists = rows, None
        else:
            self._set_scan(max_scan)

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        queries = queries.to(self.keys.codes.device)
        return self.exact.search(queries, k) if self.exact is not None else self._search_lists(queries, k)

    def _search_lists(self, queries: Tensor, k: int) -> Neighbors:
        fetch = min(k + SLACK, len(self.keys))
        max_scan = effort_for(k, self.max_scan, self.options)
        max_scan = min(max(max_scan, _SCANNED_PER_CANDIDATE * fetch), len(self.keys))
        # lists that hold `fetch` rows, whichever they are: found in at most `fetch` steps, as no list is empty;
        # torch.compile cannot trace bisect
        enough = next(lists for lists, rows in enumerate(self.smallest, 1) if rows >= fetch)
        nprobe = min(max(self.nprobe * -(-max_scan // self.max_scan), enough), len(self.sizes))
        size = self.block_bytes // (4 * max(max_scan * self.keys.width, len(self.sizes)))
        return in_blocks(lambda some: self._nearest(some, k, fetch, max_scan, nprobe), queries, max(1, size))

    def _nearest(self, queries: Tensor, k: int, fetch: int, max_scan: int, nprobe: int) -> Neighbors:
        places, used = self._places(self._nearest_lists(queries, nprobe), max_scan)
        rows = self.lists.rows[places]  # (T, max_scan) int32
        scores = self.half_norms[places] - self._products(queries, rows)
        candidates = torch.where(used, scores, torch.inf).topk(fetch, dim=-1, largest=False).indices
        return rescore(queries, self.keys, rows.gather(1, candidates).long(), k, self.max_bytes)

    def _nearest_lists(self, queries: Tensor, nprobe: int) -> Tensor:
        """(T, nprobe) int64, the lists with the nearest centroids, nearest first."""
        scaled = queries * self.lists.step
        most = max(1, min(2**8, 2**24 // (127 * self.keys.width)))  # so that float32 sums of products are exact
        unit = scaled.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / most
        with autocast_off(queries.device):
            products = torch.mm((scaled / unit).round(), self.table)
        return (self.centroid_norms - products * unit).topk(nprobe, dim=-1, largest=False).indices

    def _places(self, lists: Tensor, max_scan: int) -> tuple[Tensor, Tensor]:
        """(T, max_scan) places of the first keys of these lists, list after list, and which of them are in use."""
        sizes = self.sizes[lists]
        ends = sizes.cumsum(dim=-1)
        order = torch.arange(max_scan, device=lists.device).expand(len(lists), -1).contiguous()
        which = torch.searchsorted(ends, order, right=True).clamp_max(lists.shape[1] - 1)
        places = order + (self.starts[lists] - ends + sizes).gather(1, which)
        return places.clamp_max(len(self.keys) - 1), order < ends[:, -1:]

    def _products(self, queries: Tensor, rows: Tensor) -> Tensor:
        """(T, n) products of each query with its own keys, summed in the same order for any n."""
        scaled = (queries if self.keys.step is None else queries * self.keys.step)[:, None]
        columns = max(1, self.block_bytes // (4 * self.keys.width))
        parts = [self._codes(part).mul_(scaled).sum(dim=-1) for part in rows.split(columns, dim=-1)]
        return torch.cat(parts, dim=-1)

    def _codes(self, rows: Tensor) -> Tensor:
        """(T, n, c) float32; `index_select` takes a tenth of the time of an index."""
        return self.keys.codes.index_select(0, rows.flatten()).float().view(*rows.shape, self.keys.width)

    @property
    def nbytes(self) -> int:
        if self.exact is not None:
            return self.exact.nbytes
        own = (self.starts, self.sizes, self.half_norms, self.table, self.centroid_norms)
        return sum(tensor.nbytes for tensor in (*self.lists, *own))

    def tensors(self) -> dict[str, Tensor]:
        scan = {"scan": scan_tensor(self.max_scan, self.max_scan, len(self.keys))}
        return scan if self.exact is not None else scan | self.lists._asdict()

    @classmethod
    def from_tensors(cls, keys: StoredKeys, options: SearchOptions, tensors: dict[str, Tensor]) -> "IvfSearch":
        return cls(keys, options, tensors)
