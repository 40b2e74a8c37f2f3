"""Search of long memories on a processor by compiled code: the keys of the nearest lists, at their exact distances."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.search.base import Neighbors, SearchEngine, StoredKeys
from knnmoe_hf.search.lists import Lists, each_by_itself, sort_into_lists, told
from knnmoe_hf.search.reach import FEWEST, sample_queries, share_found

logger = logging.getLogger(__name__)

_LISTS = 8  # times the square root of the rows: centroids lie one after another, keys of a list anywhere
_TARGET = 0.99  # mean share of their neighbours that sampled queries have to find
_MARGIN = 1.5  # times as many keys as these need are searched for others
_LEAST = 2**9  # keys to be searched in lists of several
_CHOSEN = 2**6  # keys to be searched where each is a list by itself
_AFAR = 8  # rough looks, which keys lie side by side for, cost as much as reading one key where it lies
_COPIED = 2**17  # rows of which keys are copied for a rough look, at most


class ScanSearch(SearchEngine):
    """
    The `"ivf"` of processors, where its kernels were compiled: each key is in the list of its nearest centroid.

    A query is compared with keys of its nearest lists, with as many as sampled queries needed for the recall wanted.
    If they needed an eighth of all keys, each key is a list of its own; in long memories, or if that does not help
    either, a query is compared with every key.

    Keys stay where they are: the index takes 4 bytes a row, centroids some 100 a list (12 and the key's own bytes a
    row where each is one). A query gets the same answer alone and among others, to the bit. Searches of many queries
    run on PyTorch's threads, so that, like its own operations, they cannot in a process that was forked after such a
    one.
    """

    index_options = ("num_neighbors",)

    def __init__(self, keys: StoredKeys, config: KNNMoEConfig, index: dict[str, Tensor] | None = None):
        super().__init__(keys, config)
        if index is None:
            self.lists, self.budget = self._fitted(config)
        elif index.keys() == {"reach"}:
            self.budget, _ = told(index["reach"], len(keys), len(keys))
            self.lists = each_by_itself(keys) if self.budget < len(keys) else None
        else:
            self.lists, (self.budget,) = Lists.read(index, keys), told(index["reach"], len(keys))
        self._look_into(self.lists, self.budget)

    def _look_into(self, lists: Lists | None, budget: int) -> None:
        if lists is None:
            self.scan = self._scan()  # which compares a query with all keys
            return
        self.scan.look_into(*lists)
        self.scan.set_budget(budget)

    def _ways(self) -> Iterator[tuple[Lists, int]]:
        """Lists that may be worth it, and the fewest keys that are to be searched in them."""
        rows = len(self.keys)
        if rows // _AFAR > _LEAST:
            yield sort_into_lists(self.keys, round(_LISTS * rows**0.5)), _LEAST
        if rows <= _COPIED:
            yield each_by_itself(self.keys), _CHOSEN

    def _fitted(self, config: KNNMoEConfig) -> tuple[Lists | None, int]:
        """Lists, and how many keys are to be searched for a query; none where that would be a large part of all."""
        rows, queries, k = len(self.keys), sample_queries(self.keys), max(config.num_neighbors, FEWEST)
        wanted = self.search(queries, k)  # as there are no lists yet: all keys, by the very same distances
        for lists, least in self._ways():
            self._look_into(lists, budget := int(least / _MARGIN))
            while budget < rows // _AFAR and share_found(self.search(queries, k), wanted) < _TARGET:
                budget += 2 ** (budget.bit_length() - 3)  # four steps to the double
                self.scan.set_budget(budget)
            if budget < rows // _AFAR:
                return lists, max(least, int(_MARGIN * budget))
        if rows > _COPIED:
            logger.warning(
                "%d keys lie in no order, or some of them very far from all others, so that each query is compared "
                "with all of them: build with max_rows or merge_distance for fewer",
                rows,
            )
        return None, rows

    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        queries = queries.cpu().contiguous()
        distances = torch.empty(len(queries), k, dtype=torch.float32, device="cpu")
        rows = torch.empty(len(queries), k, dtype=torch.int64, device="cpu")
        asked = queries.data_ptr(), len(queries), k, distances.data_ptr(), rows.data_ptr()
        self.scan.search(*asked, torch.get_num_threads())
        return Neighbors(distances, rows)

    @property
    def nbytes(self) -> int:
        own = (tensor for tensor in self.lists or () if tensor is not self.keys.codes)
        return sum(tensor.nbytes for tensor in own) + self.scan.bytes

    def tensors(self) -> dict[str, Tensor]:
        if self.lists is None or len(self.lists.centroids) == len(self.keys):
            return {"reach": torch.tensor([self.budget, len(self.keys)])}
        return self.lists._asdict() | {"reach": torch.tensor([self.budget])}

    @classmethod
    def of_tensors(cls, keys: StoredKeys, config: KNNMoEConfig, tensors: dict[str, Tensor]) -> "ScanSearch":
        return cls(keys, config, tensors)
