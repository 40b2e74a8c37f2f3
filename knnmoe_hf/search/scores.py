"""Scores of keys and exact distances to them, which several engines share: functions on tensors."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from knnmoe_hf.search.base import Neighbors, StoredKeys

CACHE_BYTES = 2**22
"""Size of a block that a CPU handles without waiting for memory, or for the page faults of a new allocation."""

_CORE_BYTES = 2**19  # fits into one core's cache, and into what an allocator keeps for reuse
_GROUP = 16  # scores of which the least one is found first


def autocast_off(device: torch.device) -> AbstractContextManager:
    """A context in which products of float32 stay float32. Entering torch's takes as long as a small product."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def half_norms(keys: StoredKeys, max_bytes: int) -> Tensor:
    """(N,) float32, half of the keys' squared norms; no more than `max_bytes` of keys are decoded at once."""
    step = max(1, max_bytes // (4 * keys.width))
    blocks = (keys.floats(slice(start, start + step)) for start in range(0, len(keys), step))
    return torch.cat([block.square().sum(dim=-1) / 2 for block in blocks])


def in_blocks(nearest: Callable[[Tensor], Neighbors], queries: Tensor, size: int) -> Neighbors:
    """`nearest` of blocks of at most `size` queries, concatenated."""
    if queries.shape[0] <= size:
        return nearest(queries)
    return Neighbors(*(torch.cat(parts) for parts in zip(*map(nearest, queries.split(size)))))


def rescore(queries: Tensor, keys: StoredKeys, candidates: Tensor, k: int, max_bytes: int) -> Neighbors:
    """
    The k nearest of each query's candidates, by exact distances, summed element by element.

    Scores from a matrix product round differently in batches of different size; these distances do not.

    Args:
        queries: (T, c) float32.
        keys: of N rows.
        candidates: (T, C) int64 in [0, 2**31), distinct in each row, C at least k.
        k: neighbours to keep.
        max_bytes: bound of the keys gathered at once, (t, C', c) float32.

    Returns:
        Distances (T, k) and rows (T, k), nearest first, equal distances by row.
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
    nearest = packed_distances(exact, candidates).topk(k, dim=-1, largest=False).indices
    return Neighbors(exact.gather(-1, nearest), candidates.gather(-1, nearest))


def nearest_of_all(queries: Tensor, keys: StoredKeys, k: int, max_bytes: int) -> Neighbors:
    """`rescore` with all keys as candidates, to the bit, in less memory."""
    step = _at_once(queries, keys, max_bytes)
    size = max(1, max_bytes // (8 * (step + k)))  # queries, each of which keeps k numbers beside those of a block
    return in_blocks(lambda some: _nearest_of_all(some, keys, k, step), queries, size)


def _nearest_of_all(queries: Tensor, keys: StoredKeys, k: int, step: int) -> Neighbors:
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(keys), step):
        table = keys.floats(slice(start, start + step))  # (n, c)
        rows = torch.arange(start, start + len(table), device=queries.device)
        parts = queries.split(max(1, step // len(table)))
        exact = torch.cat([_squares(table - part[:, None]) for part in parts])  # (T, n)
        best = torch.cat([best, packed_distances(exact, rows)], dim=-1)
        best = best.topk(min(k, best.shape[1]), dim=-1, largest=False).values
    return Neighbors((best >> 32).int().view(torch.float32), places_of(best))


def _at_once(queries: Tensor, keys: StoredKeys, max_bytes: int) -> int:
    """Keys whose differences from a query are computed at once."""
    if queries.device.type == "cpu" and not torch.compiler.is_compiling():  # more blocks would mean more graphs
        max_bytes = min(max_bytes, _CORE_BYTES)
    return max(1, max_bytes // (4 * keys.width))


def _distances(queries: Tensor, keys: StoredKeys, rows: Tensor) -> Tensor:
    """(t, C) float32, squared L2 distances of queries (t, c) to their own rows (t, C)."""
    return _squares(keys.floats(rows).sub_(queries[:, None]))


def _squares(differences: Tensor) -> Tensor:
    """Sums (...) of the squares of differences (..., c), which are overwritten; NaN becomes inf."""
    return differences.square_().sum(dim=-1).nan_to_num_(nan=float("inf"), posinf=float("inf"))


def least_scores(
    queries: Tensor, keys: StoredKeys, half_norms: Tensor, fetch: int, step: int, banned=None
) -> tuple[Tensor, Tensor]:
    """
    The least scores `|key|^2 / 2 - query . key`, which rank keys as distances do, block by block.

    Args:
        queries: (T, c) float32.
        keys: of N rows.
        half_norms: (N,) float32, `|key|^2 / 2`.
        fetch: scores to keep of each query, at most N.
        step: keys in a block, at most.
        banned: of a slice of rows, a mask (T, n) of those that score inf; None if there are none.

    Returns:
        Scores (T, fetch) ascending, and their rows.
    """
    if queries.device.type == "cpu":
        step = min(step, max(1, CACHE_BYTES // (4 * keys.width)))
    best = rows = None
    factors = torch.cat([-queries, torch.ones_like(queries[:, :1])], dim=1)  # adds the half norm within the product
    size = len(queries) * min(step, len(keys))
    buffer = torch.empty(size, dtype=torch.float32, device=queries.device)  # reused: page faults cost the most
    for start in range(0, len(keys), step):
        block = slice(start, start + step)
        table = torch.cat([keys.floats(block), half_norms[block, None]], dim=1)  # (n, c + 1)
        scores = buffer[: len(queries) * len(table)].view(len(queries), len(table))
        with autocast_off(queries.device):
            torch.mm(factors, table.T, out=scores)
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
    `scores.topk(k, largest=False)`, twice as fast on long rows.

    The k least of a row lie in the k groups with the least minima, which take one pass over the scores.
    """
    width = scores.shape[1] // _GROUP  # groups are columns of (_GROUP, width): minima are taken vector by vector
    if width <= 4 * k:
        return scores.topk(k, dim=-1, largest=False)
    grouped = scores[:, : width * _GROUP].unflatten(1, (_GROUP, width))
    groups = grouped.amin(dim=1).topk(k, dim=-1, largest=False).indices[:, None]  # (T, 1, k)
    values = grouped.gather(2, groups.expand(-1, _GROUP, -1)).flatten(1)
    columns = groups + torch.arange(_GROUP, device=scores.device)[:, None] * width  # (T, _GROUP, k)
    rest = torch.arange(width * _GROUP, scores.shape[1], device=scores.device).expand(len(scores), -1)
    values, order = torch.cat([values, scores[:, width * _GROUP :]], dim=-1).topk(k, dim=-1, largest=False)
    return values, torch.cat([columns.flatten(1), rest], dim=-1).gather(-1, order)


def least_packed(scores: Tensor, first: int, k: int) -> Tensor:
    """
    (T, k) int64, the k least of scores (T, n) packed with their rows; column 0 is row `first`.

    As `least`, but equal scores are taken in the order of their rows, for which groups must be of successive columns.
    """
    width = scores.shape[1] // _GROUP
    rows = torch.arange(first, first + scores.shape[1], device=scores.device).expand(len(scores), -1)
    if width > k:  # the k least lie in the k groups with the least minima, or behind the last group
        grouped, rest = scores[:, : width * _GROUP].unflatten(1, (width, _GROUP)), scores[:, width * _GROUP :]
        minima = packed(grouped.amin(dim=-1), torch.arange(width, device=scores.device))
        groups = places_of(minima.topk(k, dim=-1, largest=False, sorted=False).values)[..., None]  # (T, k, 1)
        inside = first + groups * _GROUP + torch.arange(_GROUP, device=scores.device)  # (T, k, _GROUP)
        rows = torch.cat([inside.flatten(1), rows[:, width * _GROUP :]], dim=-1)
        scores = torch.cat([grouped.gather(1, groups.expand(-1, -1, _GROUP)).flatten(1), rest], dim=-1)
    return packed(scores, rows).topk(k, dim=-1, largest=False).values


def packed(scores: Tensor, places: Tensor) -> Tensor:
    """int64 that sort by score float32, then by place (0 to 2**32 - 1), so that ties are broken by place."""
    bits = scores.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # the bits of negative floats sort the other way round
    return _with_places(ordered, places)


def packed_distances(distances: Tensor, places: Tensor) -> Tensor:
    """`packed` of scores that are not negative, in a third of the time: their bits sort as they do."""
    return _with_places(distances.view(torch.int32), places)


def _with_places(bits: Tensor, places: Tensor) -> Tensor:
    return bits.long().bitwise_left_shift_(32).add_(places)


def places_of(numbers: Tensor) -> Tensor:
    """int64, the places that were packed."""
    return numbers & 0xFFFFFFFF
