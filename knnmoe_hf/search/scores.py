"""Scores of keys, and the exact second look that all engines share: functions on tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

from knnmoe_hf.search.base import Neighbors, StoredKeys

CACHE = 2**22
"""Bytes that a processor handles at once without waiting for its memory, or for new pages of it."""

_CORE_BYTES = 2**19  # that stay in one core's cache, and that an allocator keeps instead of asking for new pages
_GROUP = 16  # scores
_ROW_BITS = 32
_ROWS = 2**_ROW_BITS - 1


def half_norms(keys: StoredKeys, max_bytes: int) -> Tensor:
    """(N,) float32, half of the keys' squared norms, so many bytes of keys at a time."""
    step = max(1, max_bytes // (4 * keys.width))
    blocks = (keys.floats(slice(start, start + step)) for start in range(0, len(keys), step))
    return torch.cat([block.square().sum(dim=-1) / 2 for block in blocks])


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
        candidates: (T, C) int64 in [0, 2**31), distinct in each row, C at least k.
        k: neighbours to keep.
        max_bytes: bound of the keys gathered at once, (t, C', c) float32.
    """
    fits = _at_once(queries, keys, max_bytes)
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
    nearest = _ranked(exact, candidates).topk(k, dim=-1, largest=False).indices
    return Neighbors(exact.gather(-1, nearest), candidates.gather(-1, nearest))


def nearest_of_all(queries: Tensor, keys: StoredKeys, k: int, max_bytes: int) -> Neighbors:
    """As `rescore` of all keys, to the bit, at a cost that does not depend on how near to each other they lie."""
    step = _at_once(queries, keys, max_bytes)
    together = max(1, max_bytes // (8 * (step + k)))  # queries, of which each keeps k beside a block's numbers
    return in_blocks(lambda some: _nearest_of_all(some, keys, k, step), queries, together)


def _nearest_of_all(queries: Tensor, keys: StoredKeys, k: int, step: int) -> Neighbors:
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(keys), step):
        table = keys.floats(slice(start, start + step))  # (n, c)
        rows = torch.arange(start, start + len(table), device=queries.device)
        parts = queries.split(max(1, step // len(table)))
        exact = torch.cat([_squares(table - part[:, None]) for part in parts])  # (T, n)
        best = torch.cat([best, _ranked(exact, rows)], dim=-1)
        best = best.topk(min(k, best.shape[1]), dim=-1, largest=False).values
    return Neighbors((best >> _ROW_BITS).int().view(torch.float32), best & _ROWS)


def _at_once(queries: Tensor, keys: StoredKeys, max_bytes: int) -> int:
    """Keys whose differences to a query are computed at once."""
    if queries.device.type == "cpu" and not torch.compiler.is_compiling():  # for blocks, graphs depend on lengths
        max_bytes = min(max_bytes, _CORE_BYTES)
    return max(1, max_bytes // (4 * keys.width))


def _ranked(distances: Tensor, rows: Tensor) -> Tensor:
    """int64 in order of distance, then of row: bits of a float that is not negative ascend as it does."""
    return distances.view(torch.int32).long().bitwise_left_shift_(_ROW_BITS).add_(rows)


def _distances(queries: Tensor, keys: StoredKeys, rows: Tensor) -> Tensor:
    """(t, C) float32, squared L2 from queries (t, c) to their rows (t, C)."""
    return _squares(keys.floats(rows).sub_(queries[:, None]))


def _squares(differences: Tensor) -> Tensor:
    """Sums (...) of the squares of differences (..., c), in place; what is no number is infinitely far."""
    return differences.square_().sum(dim=-1).nan_to_num_(nan=float("inf"), posinf=float("inf"))


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
    size = len(queries) * min(step, len(keys))
    room = torch.empty(size, dtype=torch.float32, device=queries.device)  # once: new pages cost most of it
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
