"""Search of long memories on a processor by compiled code: the keys of the nearest lists, at their exact distances."""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from knnmoe_hf.search.base import Neighbors, SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.lists import Lists, each_by_itself, sort_into_lists, told
from knnmoe_hf.search.reach import FEWEST, sample_queries, share_found
from knnmoe_hf.search.residual_codes import ResidualCodes4bit, residual_codes

logger = logging.getLogger(__name__)

_LISTS = 8  # times the square root of the rows: centroids lie one after another, keys of a list anywhere
_TARGET = 0.99  # mean share of their neighbours that sampled queries have to find
_MARGIN = 1.5  # times as many keys as these need are searched, and chosen by a sketch, for others
_LEAST = 2**9  # keys to be searched in lists of several
_CHOSEN = 2**6  # keys to be searched of those that were compared roughly, at least
_AFAR = 8  # rough looks, which keys lie side by side for, cost as much as reading one key where it lies
_COPIED = 2**17  # rows of which keys are copied for a rough look, at most
_WIDER = 4  # keys to be searched for each that is wanted, at least: see Index in module.hpp
_LOST = 0.002  # share of their neighbours that sampled queries may lose by a sketch


class NativeIvfSearch(SearchEngine):
    """
    The `"ivf"` of processors, where its kernels were compiled: each key is in the list of its nearest centroid.

    A query is compared with keys of its nearest lists, with as many as sampled queries needed for the recall wanted:
    with all of them roughly, by a sketch, and exactly with those that are nearest by it. If they needed an eighth of
    all keys, each key is a list of its own; in long memories, or if that does not help either, a query is compared
    with every key.

    Keys stay where they are: the index takes 4 bytes a row and half a byte for each of its dimensions, centroids some
    100 a list (12 and the key's own bytes a row where each is one). A query gets the same answer alone and among
    others, to the bit. Searches of many queries run on PyTorch's threads, so that, like its own operations, they
    cannot in a process that was forked after such a one.
    """

    index_options = ("num_neighbors",)

    def __init__(self, keys: StoredKeys, options: SearchOptions, index: dict[str, Tensor] | None = None):
        super().__init__(keys, options)
        self.lists = self.sketch = None
        self.budget = self.chosen = len(keys)
        if index is None:
            self._fit(max(options.num_neighbors, FEWEST))
        else:
            self._read(index)

    def _read(self, index: dict[str, Tensor]) -> None:
        rows, lists, sketch = len(self.keys), None, None
        budget, chosen, count = told(index["reach"], rows, rows, rows)
        if index.keys() > {"reach"}:
            lists = Lists.read(
                {name: index[name] for name in index.keys() - set(ResidualCodes4bit._fields)}, self.keys
            )
        elif budget < rows:
            lists = each_by_itself(self.keys)
        if index.keys() & set(ResidualCodes4bit._fields):
            sketch = ResidualCodes4bit.read(index, self.keys, lists)
        if count != rows or chosen > budget or (chosen < budget) != (sketch is not None):
            raise ValueError(f"{chosen} of {budget} of {count} is no reach of {rows} keys: build them anew.")
        if lists is not None:
            self._look_into(lists, budget, chosen, sketch)

    def _look_into(
        self, lists: Lists, budget: int, chosen: int | None = None, sketch: ResidualCodes4bit | None = None
    ) -> None:
        """From now on compares a query with so many keys of these lists, by a sketch with all but those chosen."""
        if lists is not self.lists or sketch is not self.sketch:
            self.scan.set_lists(*lists, *(sketch or (None, None)))
        self.lists, self.sketch, self.budget, self.chosen = lists, sketch, budget, chosen or budget
        self.scan.set_scan(self.budget, self.chosen)

    def _ways(self) -> Iterator[tuple[Lists, int]]:
        """Lists that may be worth it, and the fewest keys that are to be searched in them."""
        rows = len(self.keys)
        if rows // _AFAR > _LEAST:
            yield sort_into_lists(self.keys, round(_LISTS * rows**0.5)), _LEAST
        if rows <= _COPIED:
            yield each_by_itself(self.keys), _CHOSEN

    def _fit(self, k: int) -> None:
        """Finds lists of which few keys have to be searched for k neighbours; there are none if that takes many."""
        queries, most = sample_queries(self.keys), len(self.keys) // _AFAR
        wanted = self.search(queries, k)  # as there are no lists yet: all keys, by the very same distances

        def found() -> float:
            return share_found(self.search(queries, k), wanted)

        for lists, least in self._ways():
            self._look_into(lists, int(least / _MARGIN))
            while self.budget < most and found() < _TARGET:
                self._look_into(lists, self.budget + 2 ** (self.budget.bit_length() - 3))  # four steps to the double
            if self.budget < most:
                self._look_into(lists, max(least, int(_MARGIN * self.budget)))
                if len(lists.centroids) < len(self.keys):
                    self._fit_sketch(k, found)
                return
        self.scan, self.lists = self._scan(), None  # which compares a query with all keys
        self.budget = self.chosen = len(self.keys)
        if len(self.keys) > _COPIED:
            logger.warning(
                "%d keys lie in no order, or some of them very far from all others, so that each query is compared "
                "with all of them: build with max_rows or merge_distance for fewer",
                len(self.keys),
            )

    def _fit_sketch(self, k: int, found: Callable[[], float]) -> None:
        """Adds a sketch, if the half of the keys that is far by it can be left out and few neighbours are lost."""
        lists, budget, chosen = self.lists, self.budget, max(_CHOSEN, _WIDER * k)
        if chosen > budget // 2:
            return
        sketch, least = residual_codes(self.keys, lists), found() - _LOST
        while chosen <= budget // 2:
            self._look_into(lists, budget, chosen, sketch)
            if found() >= least:
                return self._look_into(lists, budget, int(_MARGIN * chosen), sketch)
            chosen *= 2
        self._look_into(lists, budget)

    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        queries = queries.cpu().contiguous()
        distances = torch.empty(len(queries), k, dtype=torch.float32, device="cpu")
        rows = torch.empty(len(queries), k, dtype=torch.int64, device="cpu")
        asked = queries.data_ptr(), len(queries), k, distances.data_ptr(), rows.data_ptr()
        self.scan.search(*asked, torch.get_num_threads())
        return Neighbors(distances, rows)

    @property
    def nbytes(self) -> int:
        held = (*(self.lists or ()), *(self.sketch or ()))
        own = (tensor for tensor in held if tensor is not self.keys.codes)
        return sum(tensor.nbytes for tensor in own) + self.scan.bytes

    def tensors(self) -> dict[str, Tensor]:
        reach = {"reach": torch.tensor([self.budget, self.chosen, len(self.keys)])}
        if self.lists is None or len(self.lists.centroids) == len(self.keys):
            return reach
        return self.lists._asdict() | (self.sketch._asdict() if self.sketch else {}) | reach

    @classmethod
    def of_tensors(cls, keys: StoredKeys, options: SearchOptions, tensors: dict[str, Tensor]) -> "NativeIvfSearch":
        return cls(keys, options, tensors)
