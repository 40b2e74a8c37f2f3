"""A layer's keys sorted into lists of near ones: what an inverted file is made of."""

from typing import NamedTuple

import torch
from torch import Tensor

from knnmoe_hf.search.base import StoredKeys
from knnmoe_hf.search.scores import least

_SAMPLE, _ROUNDS = 16, 6  # keys of each list that the centroids are fitted to, and how often
_AT_ONCE = 256  # keys whose scores fit into a processor's cache
_FIXED = 2**20  # steps of a sum's terms: integers add up alike in any order, on a GPU as well
_BLOCK = 2**14


class Lists(NamedTuple):
    """N rows in L lists, and the centroid that stands for each list."""

    centroids: Tensor  # (L, c) int8
    step: Tensor  # (c,) float32, of one int8 code
    starts: Tensor  # (L + 1,) int32, where each list starts and the last one ends
    rows: Tensor  # (N,) int32, list after list; in each, keys that are like none before them come first

    @classmethod
    def read(cls, index: dict[str, Tensor], keys: StoredKeys) -> "Lists":
        """
        The lists among an engine's tensors, on the keys' device; beside them is its `reach` (see `told`).

        Raises:
            ValueError: if they are not of these keys.
        """
        if index.keys() == {*cls._fields, "reach"}:
            lists = cls(*(index[name].to(keys.codes.device) for name in cls._fields))
            if lists._are_of(keys):
                return lists
        raise ValueError(f"These lists are not of {len(keys)} keys of {keys.width} dimensions: build them anew.")

    def _are_of(self, keys: StoredKeys) -> bool:
        """Whether these are lists of so many keys of this width, each of them once."""
        lists, rows = len(self.centroids), len(keys)
        return (
            self.centroids.shape == (lists, keys.width)
            and self.step.shape == (keys.width,)
            and bool(self.step.isfinite().all())
            and self.starts.shape == (lists + 1,)
            and self.rows.shape == (rows,)
            and torch.equal(self.rows.sort().values, torch.arange(rows, device=self.rows.device).int())
            and self.starts[[0, -1]].tolist() == [0, rows]
            and bool((self.starts[1:] > self.starts[:-1]).all())  # where a difference may be no int32
        )


def told(reach: Tensor, *most: int) -> list[int]:
    """
    The counts in an index's `reach`, of keys to be searched and, for some engines, of lists: each 1 to `most`.

    Raises:
        ValueError: if that cannot be.
    """
    counts = reach.tolist() if reach.dtype == torch.int64 and reach.shape == (len(most),) else []
    if not counts or not all(1 <= count <= there for count, there in zip(counts, most)):
        raise ValueError(f"{str(reach.tolist())[:80]} cannot be searched of {list(most)}: build them anew.")
    return counts


def sort_into_lists(keys: StoredKeys, count: int) -> Lists:
    """
    k-means of a sample of the keys, then each key into its nearest centroid's list; the same for the same keys.

    Args:
        keys: of N rows.
        count: of lists, at most; there are fewer where some stay empty.
    """
    generator = torch.Generator().manual_seed(0)
    count = max(1, min(count, len(keys)))
    chosen = torch.randperm(len(keys), generator=generator)[: _SAMPLE * count].to(keys.codes.device)
    centroids = _means(keys.floats(chosen), count, generator)
    step = _step(centroids)
    codes = (centroids / step).round()
    own = torch.cat([_nearest(keys.floats(block), codes * step) for block in blocks(len(keys))])  # (N,)
    there, own, sizes = own.unique(return_inverse=True, return_counts=True)
    starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    order = _copies(keys).argsort(stable=True)
    return Lists(codes[there].to(torch.int8), step, starts, order[own[order].argsort(stable=True)].int())


def blocks(rows: int) -> list[slice]:
    """Of so many rows, a multiple of 16 in each but the last."""
    return [slice(start, start + _BLOCK) for start in range(0, rows, _BLOCK)]


def _copies(keys: StoredKeys) -> Tensor:
    """
    (N,) int64, how many of the rows before each have the very same key.

    A search that ends within a list would else see nothing but copies of one key where there are hundreds.
    """
    bits = keys.codes.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[keys.codes.element_size()])
    factors = torch.randint(2**62, (keys.width,), generator=torch.Generator().manual_seed(0)).to(bits.device)
    digests = torch.cat([(block * factors).sum(dim=-1) for block in bits.split(_AT_ONCE)])
    alike, order = digests.sort(stable=True)
    places = torch.arange(len(keys), device=bits.device)
    begins = alike != alike.roll(1)
    begins[:1] = True
    before = places - torch.where(begins, places, 0).cummax(dim=0).values
    return torch.empty_like(before).scatter_(0, order, before)


def each_by_itself(keys: StoredKeys) -> Lists:
    """A list for each key: where keys lie in no order, comparing all of them roughly finds the near ones soonest."""
    codes, step = keys.codes, keys.step
    if codes.dtype != torch.int8 or step is None:
        floats = keys.floats(slice(None))
        step = _step(floats)
        codes = (floats / step).round().to(torch.int8)
    codes = codes.contiguous()
    places = torch.arange(len(keys) + 1, dtype=torch.int32, device=codes.device)
    return Lists(codes, step, places, places[:-1])


def _step(floats: Tensor) -> Tensor:
    """(c,) of int8 codes for floats (n, c)."""
    return (floats.abs().amax(dim=0) / 127).clamp_min(torch.finfo(torch.float32).tiny)


def _means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centroids (count, c) of points (n, c)."""
    unit = (points.abs().max() / _FIXED).clamp_min(torch.finfo(torch.float32).tiny)
    centroids = points[:count]
    for _ in range(_ROUNDS):
        own = _nearest(points, centroids)
        sizes = own.bincount(minlength=count)[:, None]
        sums = own.new_zeros(count, points.shape[1])
        for part, lists in zip(points.split(_AT_ONCE), own.split(_AT_ONCE)):
            sums.index_add_(0, lists, (part / unit).round().long())
        anywhere = torch.randint(len(points), (count,), generator=generator).to(points.device)
        centroids = torch.where(sizes > 0, (sums.double() / sizes * unit).float(), points[anywhere])
    return centroids


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """(n,) the nearest centroid of each point."""
    origin = centroids[0]  # among them, so that what is far from zero in all takes no digits from the rest
    centroids, parts = centroids - origin, points.split(_AT_ONCE)
    half_norms, table = centroids.square().sum(dim=-1) / 2, centroids.T.contiguous()
    with torch.autocast(points.device.type, enabled=False):
        scores = (torch.addmm(half_norms, part - origin, table, alpha=-1) for part in parts)
        return torch.cat([least(some, 1)[1][:, 0] for some in scores])
