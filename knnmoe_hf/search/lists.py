"""Keys sorted into the lists of an inverted file, as both forms of IVF use them."""

from typing import NamedTuple

import torch
from torch import Tensor

from knnmoe_hf.search.base import StoredKeys
from knnmoe_hf.search.scores import autocast_off, least

LEAST_SCAN = 2**9
"""Keys to scan for a query, at least: centroids only roughly tell where its neighbours are."""

_PER_SQRT = 8  # lists for each square root of the rows: centroids are read sequentially, keys of a list at random
_SAMPLE, _ROUNDS = 16, 6  # k-means: sampled keys for each list, and iterations
_AT_ONCE = 256  # keys whose scores fit into a processor's cache
_FIXED_POINT = 2**20  # sums of k-means are of integers, which add up to the same in any order, on a GPU as well
_BLOCK = 2**14


class Lists(NamedTuple):
    """N rows in L lists, each row in the list of its nearest centroid."""

    centroids: Tensor  # (L, c) int8
    step: Tensor  # (c,) float32, of the centroids' codes
    starts: Tensor  # (L + 1,) int32, where each list starts in `rows`, and where the last one ends
    rows: Tensor  # (N,) int32, list after list; within a list, keys that equal an earlier one come last

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], keys: StoredKeys) -> "Lists":
        """
        The lists in an index, on the keys' device.

        Raises:
            ValueError: if they are missing or do not fit the keys.
        """
        if tensors.keys() >= set(cls._fields):
            lists = cls(*(tensors[name].to(keys.codes.device) for name in cls._fields))
            if lists._fit(keys):
                return lists
        raise ValueError(f"these lists are not of {len(keys)} keys of {keys.width} dimensions: build them anew.")

    def _fit(self, keys: StoredKeys) -> bool:
        """Whether each of the keys is in one list, and every tensor has the right size and dtype."""
        lists, rows = len(self.centroids), len(keys)
        dtypes = [tensor.dtype for tensor in self]
        return (
            dtypes == [torch.int8, torch.float32, torch.int32, torch.int32]
            and self.centroids.shape == (lists, keys.width)
            and self.step.shape == (keys.width,)
            and bool(self.step.isfinite().all())
            and self.starts.shape == (lists + 1,)
            and self.rows.shape == (rows,)
            and torch.equal(self.rows.sort().values, torch.arange(rows, device=self.rows.device).int())
            and self.starts[[0, -1]].tolist() == [0, rows]
            and bool((self.starts[1:] > self.starts[:-1]).all())  # a difference may overflow int32
        )

    @property
    def sizes(self) -> Tensor:
        """(L,) int64, rows in each list."""
        return self.starts.diff().long()


def scan_tensor(max_scan: int, max_rerank: int, rows: int) -> Tensor:
    """`scan` of an index: keys to scan for a query, keys among them to compare exactly, and all keys."""
    return torch.tensor([max_scan, max_rerank, rows])


def read_scan(tensors: dict[str, Tensor], rows: int) -> tuple[int, int]:
    """
    `max_scan` and `max_rerank` of an index.

    Raises:
        ValueError: if they are missing or cannot be of so many rows.
    """
    scan = tensors.get("scan", torch.empty(0))
    if scan.dtype == torch.int64 and scan.shape == (3,):
        max_scan, max_rerank, of = scan.tolist()
        if of == rows and 1 <= max_rerank <= max_scan <= rows:
            return max_scan, max_rerank
    raise ValueError(f"scan={str(scan.tolist())[:80]} cannot be of {rows} keys: build the index anew.")


def sort_into_lists(keys: StoredKeys) -> Lists:
    """
    k-means of a sample of the keys, then each key into the list of its nearest centroid.

    The same keys give the same lists. There are about `8 * sqrt(N)`, fewer where some stay empty.

    Raises:
        ValueError: for 2**31 keys or more, as lists hold int32 rows.
    """
    rows = len(keys)
    check_row_count(rows)
    count, generator = max(1, min(round(_PER_SQRT * rows**0.5), rows)), torch.Generator().manual_seed(0)
    sample = torch.randperm(rows, generator=generator)[: _SAMPLE * count].to(keys.codes.device)
    centroids = _k_means(keys.floats(sample), count, generator)
    step = _int8_step(centroids)
    codes = (centroids / step).round()
    own = torch.cat([_nearest(keys.floats(block), codes * step) for block in blocks(rows)])  # (N,)
    used, own, sizes = own.unique(return_inverse=True, return_counts=True)
    starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    order = _earlier_copies(keys).argsort(stable=True)
    return Lists(codes[used].to(torch.int8), step, starts, order[own[order].argsort(stable=True)].int())


def one_list_per_key(keys: StoredKeys) -> Lists:
    """
    Each key in a list of its own: the centroids are int8 copies of the keys.

    Where keys do not cluster, scanning all of the copies is the fastest way to the near ones.

    Raises:
        ValueError: for 2**31 keys or more.
    """
    check_row_count(len(keys))
    codes, step = keys.codes, keys.step
    if codes.dtype != torch.int8 or step is None:
        floats = keys.floats(slice(None))
        step = _int8_step(floats)
        codes = (floats / step).round().to(torch.int8)
    codes = codes.contiguous()
    starts = torch.arange(len(keys) + 1, dtype=torch.int32, device=codes.device)
    return Lists(codes, step, starts, starts[:-1])


def check_row_count(rows: int) -> None:
    """
    Raises:
        ValueError: unless rows can be numbered by an int32.
    """
    if rows >= 2**31:
        raise ValueError(
            f"{rows:,} rows in a layer are too many for lists, which hold fewer than 2**31: "
            "use search_backend='torch', or build with max_rows."
        )


def blocks(rows: int) -> list[slice]:
    """Slices of so many rows, of a multiple of 16 rows each but the last."""
    return [slice(start, start + _BLOCK) for start in range(0, rows, _BLOCK)]


def _earlier_copies(keys: StoredKeys) -> Tensor:
    """
    (N,) int64, how many earlier rows have exactly the same key.

    In this order, a scan that ends within a list has not seen hundreds of copies of one key and nothing else.
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


def _int8_step(floats: Tensor) -> Tensor:
    """(c,) the steps in which int8 codes cover floats (n, c)."""
    return (floats.abs().amax(dim=0) / 127).clamp_min(torch.finfo(torch.float32).tiny)


def _k_means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centroids (count, c) of points (n, c)."""
    unit = (points.abs().max() / _FIXED_POINT).clamp_min(torch.finfo(torch.float32).tiny)
    centroids = points[:count]
    for _ in range(_ROUNDS):
        own = _nearest(points, centroids)
        sizes = own.bincount(minlength=count)[:, None]
        sums = own.new_zeros(count, points.shape[1])
        for part, lists in zip(points.split(_AT_ONCE), own.split(_AT_ONCE)):
            sums.index_add_(0, lists, (part / unit).round().long())
        restarts = torch.randint(len(points), (count,), generator=generator).to(points.device)  # for empty lists
        centroids = torch.where(sizes > 0, (sums.double() / sizes * unit).float(), points[restarts])
    return centroids


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """(n,) int64, the nearest centroid of each point."""
    origin = centroids[0]  # a common offset of all keys would take digits from the differences between them
    centroids, parts = centroids - origin, points.split(_AT_ONCE)
    half_norms, table = centroids.square().sum(dim=-1) / 2, centroids.T.contiguous()
    with autocast_off(points.device):
        scores = (torch.addmm(half_norms, part - origin, table, alpha=-1) for part in parts)
        return torch.cat([least(some, 1)[1][:, 0] for some in scores])
