"""Search of long memories on a processor by compiled code: the keys of the nearest lists, at their exact distances."""

import logging

import torch
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.search.base import Neighbors, SearchEngine, StoredKeys
from knnmoe_hf.search.lists import Lists, each_by_itself, sort_into_lists
from knnmoe_hf.search.reach import FEWEST, sample_queries, share_found

logger = logging.getLogger(__name__)

_LISTS = 8  # times the square root of the rows: centroids are read one after another, keys of a list from anywhere
_TARGET = 0.995  # share of their neighbours that sampled queries must find,
_MARGIN = 2  # by that part of the keys that are searched for others
_LEAST = 2**8  # keys to be searched,
_CHOSEN = 2**5  # or of all
_AFAR = 8  # a key that lies anywhere costs as much as a rough look at so many,
_COPIED = 2**17  # for which keys are copied: of no more rows


class ScanSearch(SearchEngine):
    """
    The `"ivf"` of processors, where its kernels were compiled: each key in the list of its nearest centroid, and of a
    query's nearest lists so many keys as are needed for the recall wanted of sampled queries. Of a memory that is not
    long, where that is an eighth of them or more, each is a list by itself.

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
        elif index.keys() == {"reach"} and index["reach"].tolist()[1:] == [len(keys)]:
            self.lists, self.budget = each_by_itself(keys), int(index["reach"][0])
        else:
            self.lists, self.budget = Lists.read(index, keys), int(index["reach"])
        self.scan.look_into(*self.lists)
        self.scan.set_budget(self.budget)

    def _fitted(self, config: KNNMoEConfig) -> tuple[Lists, int]:
        """Lists, and how many keys are to be searched for a query."""
        rows, (queries, k) = len(self.keys), (sample_queries(self.keys), max(config.num_neighbors, FEWEST))
        wanted = self.search(queries, k)  # as there are no lists yet: all keys, by the very same distances

        def enough(lists: Lists, least: int, most: int) -> int:
            self.scan.look_into(*lists)
            self.scan.set_budget(budget := least)
            while budget < most and share_found(self.search(queries, k), wanted) < _TARGET:
                budget += 2 ** (budget.bit_length() - 3)  # four steps to the double
                self.scan.set_budget(budget)
            return min(_MARGIN * budget, rows)

        is_long, many = rows > _COPIED, rows // _AFAR
        if is_long or many > _MARGIN * _LEAST:
            lists = sort_into_lists(self.keys, round(_LISTS * rows**0.5))
            budget = enough(lists, _LEAST, rows if is_long else many)
            if is_long or budget < many:
                if budget >= many:
                    logger.warning("%d keys lie in no order: %d of them are searched for each query", rows, budget)
                return lists, budget
        lists = each_by_itself(self.keys)
        return lists, enough(lists, _CHOSEN, rows)

    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        queries = queries.cpu().contiguous()
        distances = torch.empty(len(queries), k, dtype=torch.float32, device="cpu")
        rows = torch.empty(len(queries), k, dtype=torch.int64, device="cpu")
        asked = queries.data_ptr(), len(queries), k, distances.data_ptr(), rows.data_ptr()
        self.scan.search(*asked, torch.get_num_threads())
        return Neighbors(distances, rows)

    @property
    def nbytes(self) -> int:
        own = (tensor for tensor in self.lists if tensor is not self.keys.codes)
        return sum(tensor.nbytes for tensor in own) + self.scan.bytes

    def tensors(self) -> dict[str, Tensor]:
        if len(self.lists.centroids) == len(self.keys):
            return {"reach": torch.tensor([self.budget, len(self.keys)])}
        return self.lists._asdict() | {"reach": torch.tensor([self.budget])}

    @classmethod
    def of_tensors(cls, keys: StoredKeys, config: KNNMoEConfig, tensors: dict[str, Tensor]) -> "ScanSearch":
        return cls(keys, config, tensors)
