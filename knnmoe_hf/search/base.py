"""What a search engine is to the rest of the library, and the exact second look that all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig

_GROUP = 16
_SAMPLE, _MOVED = 256, 0.2
_AT_ONCE = 2**19  # bytes that stay in a core's cache, and that an allocator keeps instead of asking for new pages
_ROW_BITS = 32

SLACK = 8
"""Candidates that an engine fetches beyond those asked for, so that rounding in its own distances decides nothing."""

CACHE = 2**22
"""Bytes that a processor handles at once without waiting for its memory, or for new pages of it."""


class Neighbors(NamedTuple):
    """The nearest rows of each query, nearest first, equal distances in the order of their rows."""

    distances: Tensor  # (T, K) float32, squared L2
    rows: Tensor  # (T, K) int64


class Source(NamedTuple):
    """Where keys lie on disk, and a digest of what they are."""

    place: str
    digest: str


class StoredKeys(NamedTuple):
    """Keys (N, c) as they are stored; int8 codes have the size of a step in each dimension."""

    codes: Tensor  # (N, c) float32, bfloat16, float16 or int8
    step: Tensor | None = None  # (c,) float32
    source: Source | None = None  # of keys that are exactly those on disk

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        """c."""
        return self.codes.shape[1]

    def floats(self, rows: Tensor | slice) -> Tensor:
        """Some of the keys, (..., c) float32: a copy by index (...) int64, maybe a view by slice."""
        if isinstance(rows, slice):
            codes = self.codes[rows]
        else:  # many times as fast as an index of two dimensions
            codes = self.codes.index_select(0, rows.flatten()).view(*rows.shape, self.width)
        return codes.float() if self.step is None else codes * self.step

    def to(self, device: torch.device) -> "StoredKeys":
        """The same on `device`."""
        step = self.step.to(device) if self.step is not None else None
        return StoredKeys(self.codes.to(device), step, self.source)


class SearchEngine(ABC):
    """
    Nearest rows of one layer's keys; an engine is a cache that can always be rebuilt from them.

    Args:
        keys: `StoredKeys` of N rows, N at least 1, on the device where the layer runs.
        config: the memory's configuration, for the engine's own options.

    Attributes:
        least_rows: memories of fewer are searched exactly instead.
        package: whose version an index depends on; None if it is the library's own.
        traceable: whether `search` branches on nothing but shapes, so that a compiler may look into it.
    """

    least_rows = 0
    package: str | None = None
    traceable = False

    def __init__(self, keys: StoredKeys, config: KNNMoEConfig):
        self.keys = keys
        self.max_bytes = config.search_max_bytes

    def search(self, queries: Tensor, k: int) -> Neighbors:
        """
        The `min(k, N)` nearest rows of each query by squared L2 distance in float32.

        A query's answer does not depend on how many others are asked with it.

        Args:
            queries: (T, c), any float dtype, on any device.
            k: neighbours per query.

        Returns:
            `Neighbors` on the queries' device.
        """
        k = min(k, len(self.keys))
        distances, rows = self._search(queries.detach().float(), k, min(k + SLACK, len(self.keys)))
        return Neighbors(distances.to(queries.device), rows.to(queries.device))

    def search_one(self, query: Tensor, k: int) -> tuple[list[float], np.ndarray]:
        """`search` for a single query (1, c) on the CPU: distances, and rows (K,) int64."""
        found = self.search(query, k)
        return found.distances[0].tolist(), found.rows[0].numpy()

    @abstractmethod
    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        """Fetches `fetch` candidates per query and hands them to `rescore`."""

    @property
    def nbytes(self) -> int:
        """Bytes that the engine holds beside the keys."""
        return 0

    def tensors(self) -> dict[str, Tensor]:
        """What `of_tensors` needs to make this engine again without building it; empty if that is no gain."""
        return {}

    @classmethod
    def of_tensors(cls, keys: StoredKeys, config: KNNMoEConfig, tensors: dict[str, Tensor]) -> "SearchEngine":
        """
        The engine over the same keys that gave these `tensors`.

        Raises:
            ValueError: for tensors that are not of these keys.
        """
        return cls(keys, config)


class KeyArrays:
    """Keys as numpy sees them, for one query at a time: there, operations on tensors cost more than what they do."""

    def __init__(self, keys: StoredKeys):
        self.codes = keys.codes.numpy()
        self.step = keys.step.numpy() if keys.step is not None else np.float32(1)

    def nearest(self, query: np.ndarray, rows: np.ndarray, k: int) -> tuple[list[float], np.ndarray]:
        """As `rescore`, of one query (c,) and its candidates (C,)."""
        apart = self.codes.take(rows, axis=0) * self.step
        apart -= query
        apart *= apart
        distances = apart.sum(axis=-1)
        order = np.lexsort((rows, distances))[:k]
        return distances[order].tolist(), rows[order]


def in_blocks(nearest: Callable[[Tensor], Neighbors], queries: Tensor, size: int) -> Neighbors:
    """`nearest` of at most `size` queries at a time."""
    if queries.shape[0] <= size:
        return nearest(queries)
    return Neighbors(*(torch.cat(parts) for parts in zip(*map(nearest, queries.split(size)))))


def sample_queries(keys: StoredKeys) -> Tensor:
    """
    (S, c) float32, by which an engine fits how far it looks: keys moved a part of the way to another.

    A new text's queries lie further from the keys than these from each other, and are harder to answer. Moved by a
    fifth, keys are as hard: an engine that finds 0.99 of their neighbours found 0.98 to 0.996 of those of held-out
    text in the layers of three models of the lab.
    """
    rows = torch.linspace(0, len(keys) - 1, min(len(keys), _SAMPLE), dtype=torch.float64).long()
    table = keys.floats(rows.to(keys.codes.device))
    return torch.lerp(table, table.roll(len(rows) // 2, dims=0), _MOVED)


def recall(found: Neighbors, wanted: Neighbors) -> float:
    """Share of the wanted neighbours that were found, or others as near."""
    return (found.distances <= wanted.distances[:, -1:]).float().mean().item()


def rescore(queries: Tensor, keys: StoredKeys, candidates: Tensor, k: int, max_bytes: int) -> Neighbors:
    """
    The k nearest of each query's candidates, by distances computed anew, element by element.

    An engine's own distances may depend on the batch (a matrix product does) or be approximate; these do not.

    Args:
        queries: (T, c) float32.
        keys: of N rows.
        candidates: (T, C) int64 in [0, 2**31), distinct in each row, C at least k.
        k: neighbours to keep.
        max_bytes: bound of the keys gathered at once, (t, C', c) float32.
    """
    if queries.device.type == "cpu" and not torch.compiler.is_compiling():  # for blocks, graphs depend on lengths
        max_bytes = min(max_bytes, _AT_ONCE)
    fits = max(1, max_bytes // (4 * keys.width))  # keys gathered at once
    if candidates.numel() <= fits:
        exact = _distances(queries, keys, candidates)  # (T, C)
    else:
        columns = min(candidates.shape[1], fits)
        blocks = zip(*(tensor.split(max(1, fits // columns)) for tensor in (queries, candidates)))
        exact = torch.cat(
            [
                torch.cat([_distances(query, keys, some) for some in rows.split(columns, dim=-1)], dim=-1)
                for query, rows in blocks
            ]
        )
    # one number orders by distance, then by row: bits of a float that is not negative ascend as it does
    ranked = exact.view(torch.int32).long().bitwise_left_shift_(_ROW_BITS).add_(candidates)
    nearest = ranked.topk(k, dim=-1, largest=False).indices
    return Neighbors(exact.gather(-1, nearest), candidates.gather(-1, nearest))


def _distances(queries: Tensor, keys: StoredKeys, rows: Tensor) -> Tensor:
    """(t, C) float32, squared L2 from queries (t, c) to their rows (t, C)."""
    return keys.floats(rows).sub_(queries[:, None]).square_().sum(dim=-1)


def least_scores(
    queries: Tensor, keys: StoredKeys, half_norms: Tensor, fetch: int, step: int, banned=None
) -> tuple[Tensor, Tensor]:
    """
    The least scores `|key|^2 / 2 - query . key`, which order keys as their distances do, block by block.

    Args:
        queries: (T, c) float32.
        keys: of N rows.
        half_norms: (N,) float32, `|key|^2 / 2`.
        fetch: scores to keep of each query, at most N.
        step: keys in a block, at most.
        banned: of a slice of rows, which (T, n) are out of the question; they score inf.

    Returns:
        Scores (T, fetch) ascending, and their rows.
    """
    if queries.device.type == "cpu":
        step = min(step, max(1, CACHE // (4 * keys.width)))
    best = rows = None
    asked = torch.cat([-queries, torch.ones_like(queries[:, :1])], dim=1)  # one product does the sum as well
    room = torch.empty(len(queries) * min(step, len(keys)), device=queries.device)  # once: new pages cost most of it
    for start in range(0, len(keys), step):
        block = slice(start, start + step)
        table = torch.cat([keys.floats(block), half_norms[block, None]], dim=1)  # (n, c + 1)
        scores = room[: len(queries) * len(table)].view(len(queries), len(table))
        with torch.autocast(queries.device.type, enabled=False):
            torch.mm(asked, table.T, out=scores)
        if banned is not None:
            scores.masked_fill_(banned(block), float("inf"))
        values, ids = least(scores, min(fetch, scores.shape[1]))
        ids = ids + start
        if best is not None:
            values, ids = torch.cat([best, values], dim=-1), torch.cat([rows, ids], dim=-1)
            values, order = values.topk(min(fetch, values.shape[1]), dim=-1, largest=False)
            ids = ids.gather(-1, order)
        best, rows = values, ids
    return best, rows


def least(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    As `scores.topk(k, largest=False)`, twice as fast on long rows.

    The k least of a row lie in the k groups with the least minima, and minima cost one pass over the scores.
    """
    width = scores.shape[1] // _GROUP  # of a row of groups: a group is a column of it, so that minima are vectors
    if width <= 4 * k:
        return scores.topk(k, dim=-1, largest=False)
    grouped = scores[:, : width * _GROUP].unflatten(1, (_GROUP, width))
    chosen = grouped.amin(dim=1).topk(k, dim=-1, largest=False).indices[:, None]  # (T, 1, k)
    values = grouped.gather(2, chosen.expand(-1, _GROUP, -1)).flatten(1)
    columns = chosen + torch.arange(_GROUP, device=scores.device)[:, None] * width  # (T, _GROUP, k)
    behind = torch.arange(width * _GROUP, scores.shape[1], device=scores.device).expand(len(scores), -1)
    values, order = torch.cat([values, scores[:, width * _GROUP :]], dim=-1).topk(k, dim=-1, largest=False)
    return values, torch.cat([columns.flatten(1), behind], dim=-1).gather(-1, order)
