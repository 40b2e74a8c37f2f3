"""Approximate search of long memories on any device: the nearest lists are searched, the other keys are not."""

import torch
from torch import Tensor

from knnmoe_hf.search.base import Neighbors, SearchEngine, SearchOptions, StoredKeys
from knnmoe_hf.search.lists import Lists, sort_into_lists, told
from knnmoe_hf.search.scores import CACHE, in_blocks, least_scores, rescore

_RECALL = 0.995  # of the sampled rows' own neighbours; those of queries are found a little less often
_SAMPLE = 256
_NEIGHBOURHOODS, _TEXT = 32, 2**12  # rows further apart than this part of the memory, or so many, are of other texts
_FEW = 1024  # rows, of which all are searched
_LENGTH = 64  # of a list on average,
_MOST = 2**13  # until there are so many lists: sorting a key in costs as much as there are
_BLOCK = 2**14
_WIDER = 4  # candidates that are searched for each one to be fetched, at least


class IvfSearch(SearchEngine):
    """
    An inverted file: each key in the list of its nearest centroid, and of each query's nearest lists so many keys as
    are needed for the recall wanted, which is measured on the keys when the index is built.

    Shapes depend on nothing but the number of queries, and nothing branches on data. Lists are as long as they are:
    what is fixed is the number of keys searched, and lists are read until there are so many. Centroids are small
    integers, queries are rounded to such when they are compared with them, and so the order of lists is the same in a
    product of any shape. The index takes 8 bytes a key, centroids some 5 more.
    """

    traceable = True
    index_options = ("num_neighbors",)

    def __init__(self, keys: StoredKeys, options: SearchOptions, index: dict[str, Tensor] | None = None):
        super().__init__(keys, options)
        device = keys.codes.device
        if index is None:
            self.lists = sort_into_lists(keys, min(len(keys) // _LENGTH, _MOST))
        else:
            self.lists = Lists.read(index, keys)
        self.starts = self.lists.starts[:-1].long()
        self.sizes = self.lists.starts.diff().long()
        self.half_norms = self._half_norms()
        floats = self.lists.centroids.float()
        self.table = floats.T.contiguous()  # (c, L)
        self.centroid_norms = (floats * self.lists.step).square().sum(dim=-1) / 2
        self.fewest = self.sizes.sort().values.cumsum(0).tolist()  # rows in any 1, 2, ... lists, at least
        self.room = min(self.max_bytes, CACHE) if device.type == "cpu" else self.max_bytes
        self.budget, self.probes = (
            self._tuned(options.num_neighbors) if index is None else told(index["reach"], len(keys), len(self.sizes))
        )

    def _half_norms(self) -> Tensor:
        """(N,) float32, half of the keys' squared norms, list after list."""
        rows = self.lists.rows.long().split(max(1, self.max_bytes // (4 * self.keys.width)))
        return torch.cat([self.keys.floats(part).square().sum(dim=-1) / 2 for part in rows])

    def _tuned(self, k: int) -> tuple[int, int]:
        """Keys to be searched for a query, and lists that hold as many."""
        rows, lists = len(self.keys), len(self.sizes)
        if rows <= _FEW:
            return rows, lists
        device = self.sizes.device
        sample = torch.linspace(0, rows - 1, _SAMPLE, dtype=torch.float64).round().long().to(device)
        place = self.lists.rows.argsort()  # (N,) int64, where each row is in the lists
        own = torch.repeat_interleave(torch.arange(lists, device=device), self.sizes)[place]  # (N,) list of each row
        by_row, reach = self.half_norms[place], min(rows // _NEIGHBOURHOODS, _TEXT)
        near = _held_out_neighbours(self.keys, by_row, sample, min(k, rows // 2), reach)
        order = self._nearest_lists(self.keys.floats(sample), lists)  # (S, L)
        ends = self.sizes[order].cumsum(dim=-1)
        before = torch.empty_like(ends).scatter_(1, order, ends - self.sizes[order])  # keys in lists that come first
        reached = before.gather(1, own[near]) + place[near] - self.starts[own[near]] + 1
        wanted = reached.flatten().sort().values[int(_RECALL * (reached.numel() - 1))].item()
        return wanted, min(lists, int((ends < wanted).sum(dim=-1).max()) + 1)

    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        queries = queries.to(self.keys.codes.device)
        budget = min(max(self.budget, _WIDER * fetch), len(self.keys))
        enough = next(lists for lists, held in enumerate(self.fewest, 1) if held >= fetch)
        probes = min(max(self.probes * -(-budget // self.budget), enough), len(self.sizes))
        together = self.room // (4 * max(budget * self.keys.width, len(self.sizes)))
        return in_blocks(lambda some: self._nearest(some, k, fetch, budget, probes), queries, max(1, together))

    def _nearest(self, queries: Tensor, k: int, fetch: int, budget: int, probes: int) -> Neighbors:
        slots, there = self._slots(self._nearest_lists(queries, probes), budget)
        rows = self.lists.rows[slots]  # (T, budget) int32
        scores = self.half_norms[slots] - self._products(queries, rows)
        chosen = torch.where(there, scores, torch.inf).topk(fetch, dim=-1, largest=False).indices
        return rescore(queries, self.keys, rows.gather(1, chosen).long(), k, self.max_bytes)

    def _nearest_lists(self, queries: Tensor, probes: int) -> Tensor:
        """(T, probes) int64, the lists with the nearest centroids, nearest first."""
        scaled = queries * self.lists.step
        most = max(1, min(2**8, 2**24 // (127 * self.keys.width)))  # so that no sum of products is ever rounded
        unit = scaled.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / most
        with torch.autocast(queries.device.type, enabled=False):
            products = torch.mm((scaled / unit).round(), self.table)
        return (self.centroid_norms - products * unit).topk(probes, dim=-1, largest=False).indices

    def _slots(self, lists: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """(T, budget) places of the first keys of these lists, one after another, and whether there are so many."""
        sizes = self.sizes[lists]
        ends = sizes.cumsum(dim=-1)
        place = torch.arange(budget, device=lists.device).expand(len(lists), -1).contiguous()
        which = torch.searchsorted(ends, place, right=True).clamp_max(lists.shape[1] - 1)
        slots = place + (self.starts[lists] - ends + sizes).gather(1, which)
        return slots.clamp_max(len(self.keys) - 1), place < ends[:, -1:]

    def _products(self, queries: Tensor, rows: Tensor) -> Tensor:
        """(T, n) products of each query and its own keys, summed alike however many there are."""
        asked = (queries if self.keys.step is None else queries * self.keys.step)[:, None]
        columns = max(1, self.room // (4 * self.keys.width))
        parts = [self._codes(part).mul_(asked).sum(dim=-1) for part in rows.split(columns, dim=-1)]
        return torch.cat(parts, dim=-1)

    def _codes(self, rows: Tensor) -> Tensor:
        """(T, n, c) float32; `index_select` takes a tenth of the time that indexing takes."""
        return self.keys.codes.index_select(0, rows.flatten()).float().view(*rows.shape, self.keys.width)

    @property
    def nbytes(self) -> int:
        own = (self.starts, self.sizes, self.half_norms, self.table, self.centroid_norms)
        return sum(tensor.nbytes for tensor in (*self.lists, *own))

    def tensors(self) -> dict[str, Tensor]:
        return self.lists._asdict() | {"reach": torch.tensor([self.budget, self.probes])}

    @classmethod
    def of_tensors(cls, keys: StoredKeys, options: SearchOptions, tensors: dict[str, Tensor]) -> "IvfSearch":
        return cls(keys, options, tensors)


def _held_out_neighbours(keys: StoredKeys, half_norms: Tensor, sample: Tensor, k: int, reach: int) -> Tensor:
    """
    (S, k) int64, the nearest rows of sampled rows (S,) beyond those at most `reach` before and after them.

    A new text's tokens are further off than a row's own text is, which is stored around it.
    """
    places = torch.arange(len(keys), device=sample.device)

    def near(part: Tensor) -> Tensor:
        return least_scores(
            keys.floats(part), keys, half_norms, k, _BLOCK, lambda rows: (part[:, None] - places[rows]).abs() <= reach
        )[1]

    return torch.cat([near(part) for part in sample.split(64)])
