"""How far an approximate engine must search: measured on sampled queries when its index is built."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from knnmoe_hf.search.base import Neighbors, StoredKeys
from knnmoe_hf.search.options import SearchOptions

LEAST_NEIGHBORS = 16
"""Engines are tuned for at least so many neighbours: a single nearest one is found too easily."""

RECALL = 0.99
"""Mean share of their neighbours that the sampled queries must find."""

SEQUENTIAL_READS = 8
"""Sequential reads of keys, or of their centroids, that take as long as reading one key at random."""

_SAMPLE, _SHIFT = 256, 0.2
_MARGIN = 1.5


def tuned_for(options: SearchOptions) -> int:
    """The number of neighbours for which approximate engines are tuned."""
    return max(options.num_neighbors, LEAST_NEIGHBORS)


def effort_for(k: int, effort: int, options: SearchOptions) -> int:
    """
    The effort of a search for k neighbours: in proportion for more of them than it was tuned for.

    Of 64 neighbours, native lists that were tuned for 16 found 0.962 without that and 0.990 with it, as many as lists
    that were tuned for 64, among 206 k keys around those of a lab model (queries of held-out text).

    Args:
        k: neighbours to be found.
        effort: keys to scan, lists to probe, or the width of a beam, as tuned.
        options: for which it was tuned.
    """
    tuned = tuned_for(options)
    return effort if k <= tuned else -(-effort * k // tuned)


def sample_queries(keys: StoredKeys) -> Tensor:
    """
    Queries (S, c) float32 for tuning, S at most 256: stored keys, shifted by a fifth of the way to another key.

    Held-out text has queries that lie further from the keys than keys from each other, and are harder to answer. With
    this shift the sampled ones are as hard: engines that find 0.99 of their neighbours found 0.98 to 0.996 of those of
    held-out text, in layers of three lab models.
    """
    rows = torch.linspace(0, len(keys) - 1, min(len(keys), _SAMPLE), dtype=torch.float64).long()
    table = keys.floats(rows.to(keys.codes.device))
    return torch.lerp(table, table.roll(len(rows) // 2, dims=0), _SHIFT)


def recall(found: Neighbors, exact: Neighbors) -> float:
    """
    Mean share of the exact neighbours that were found, both (T, K).

    A row as near as the last exact neighbour counts as that neighbour, but not as a nearer one that was missed.
    """
    last, k = exact.distances[:, -1:], exact.distances.shape[1]
    nearer, all_nearer = ((some.distances < last).sum(dim=-1) for some in (found, exact))
    as_near = (found.distances <= last).sum(dim=-1) - nearer
    return ((nearer.minimum(all_nearer) + as_near.minimum(k - all_nearer)) / k).mean().item()


def least_effort(search: Callable[[int], Neighbors], exact: Neighbors, first: int, limit: int) -> int | None:
    """
    The least effort at which the sampled queries find `RECALL` of their neighbours.

    Args:
        search: of the sampled queries, with an effort (keys to scan, lists to probe).
        exact: their true neighbours.
        first: the first effort to try; the next ones grow by an eighth to a quarter each.
        limit: the search gives up at this effort.

    Returns:
        An effort below `limit`; None if none of them is enough.
    """
    return next((effort for effort in _efforts(first, limit) if recall(search(effort), exact) >= RECALL), None)


def fit_max_scan(search: Callable[[int], Neighbors], exact: Neighbors, rows: int, least: int) -> int | None:
    """
    Keys to scan for a query in lists.

    What is just enough for the sampled queries is too little for some others, so that half as many keys again are
    scanned.

    Args:
        search: of the sampled queries, scanning so many keys of their nearest lists.
        exact: their true neighbours.
        rows: keys in all lists.
        least: keys to scan at least.

    Returns:
        The number of keys; None if an eighth of all keys is not enough, as lists are of no use then: reading a key
        where it lies costs as much as about eight sequential reads.
    """
    enough = least_effort(search, exact, int(least / _MARGIN), rows // SEQUENTIAL_READS)
    return None if enough is None else max(least, int(_MARGIN * enough))


def _efforts(first: int, limit: int) -> Iterator[int]:
    """Ascending, four steps to each doubling."""
    effort = first
    while effort < limit:
        yield effort
        effort += max(1, 2 ** (effort.bit_length() - 3))
