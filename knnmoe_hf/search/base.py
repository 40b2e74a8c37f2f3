"""What a search engine is to the rest of the library, and the exact second look that all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig

_GROUP = 16

SLACK = 8
"""Candidates that an engine fetches beyond those asked for, so that rounding in its own distances decides nothing."""

CACHE = 2**22
"""Bytes that a processor handles at once without waiting for its memory, or for new pages of it."""


class Neighbors(NamedTuple):
    """The nearest rows of each query, nearest first, equal distances in the order of their rows."""

    distances: Tensor  # (T, K) float32, squared L2
    rows: Tensor  # (T, K) int64


class StoredKeys(NamedTuple):
    """Keys (N, c) as they are stored; int8 codes have the size of a step in each dimension."""

    codes: Tensor  # (N, c) float32, bfloat16, float16 or int8
    step: Tensor | None = None  # (c,) float32

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        """c."""
        return self.codes.shape[1]

    def floats(self, rows: Tensor | slice) -> Tensor:
        """Some of the keys, (..., c) float32."""
        codes = self.codes[rows].float()
        return codes if self.step is None else codes * self.step

    def to(self, device: torch.device) -> "StoredKeys":
        """The same on `device`."""
        return StoredKeys(self.codes.to(device), self.step.to(device) if self.step is not None else None)


class SearchEngine(ABC):
    """
    Nearest rows of one layer's keys; an engine is a cache that can always be rebuilt from them.

    Args:
        keys: `StoredKeys` of N rows, N at least 1, on the device where the layer runs.
        config: the memory's configuration, for the engine's own options.

    Attributes:
        traceable: whether `search` branches on nothing but shapes, so that a compiler may look into it.
    """

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
        found = self._search(queries.detach().float(), k, min(k + SLACK, len(self.keys)))
        return Neighbors(*(tensor.to(queries.device) for tensor in found))

    @abstractmethod
    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        """Fetches `fetch` candidates per query and hands them to `rescore`."""

    @property
    def nbytes(self) -> int:
        """Bytes that the engine holds beside the keys."""
        return 0

    def tensors(self) -> dict[str, Tensor]:
        """What `of_tensors` needs beside the keys; nothing where a new engine is built as fast."""
        return {}

    @classmethod
    def of_tensors(cls, keys: StoredKeys, config: KNNMoEConfig, tensors: dict[str, Tensor]) -> "SearchEngine":
        """
        The engine whose `tensors` these are, without the work of building it.

        Raises:
            ValueError: for tensors that are not of these keys.
        """
        return cls(keys, config)


def in_blocks(nearest: Callable[[Tensor], Neighbors], queries: Tensor, size: int) -> Neighbors:
    """`nearest` of at most `size` queries at a time."""
    if queries.shape[0] <= size:
        return nearest(queries)
    return Neighbors(*(torch.cat(parts) for parts in zip(*map(nearest, queries.split(size)))))


def rescore(queries: Tensor, keys: StoredKeys, candidates: Tensor, k: int, max_bytes: int) -> Neighbors:
    """
    The k nearest of each query's candidates, by distances computed anew, element by element.

    An engine's own distances may depend on the batch (a matrix product does) or be approximate; these do not.

    Args:
        queries: (T, c) float32.
        keys: of N rows.
        candidates: (T, C) int64, distinct in each row, C at least k.
        k: neighbours to keep.
        max_bytes: bound of the keys gathered at once, (t, C', c) float32.
    """
    rows = candidates.sort(dim=-1).values
    fits = max(1, max_bytes // (4 * keys.width))  # keys gathered at once
    columns = min(rows.shape[1], fits)
    exact = torch.empty(rows.shape, dtype=torch.float32, device=queries.device)  # (T, C)
    for some, asked, out in zip(*(tensor.split(max(1, fits // columns)) for tensor in (rows, queries, exact))):
        for part, target in zip(some.split(columns, dim=-1), out.split(columns, dim=-1)):
            target.copy_((keys.floats(part) - asked[:, None]).square().sum(dim=-1))
    distances, order = exact.sort(dim=-1, stable=True)
    return Neighbors(distances[:, :k], rows.gather(-1, order[:, :k]))


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
