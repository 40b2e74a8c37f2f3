"""How far apart a layer's keys lie: what the confidence's constants are made of."""

import torch
from torch import Tensor

from knnmoe_hf.search import StoredKeys
from knnmoe_hf.search.base import SLACK
from knnmoe_hf.search.scores import half_norms, least_scores, rescore

SAMPLE = 512
"""Rows that act as queries, evenly spread over the memory."""
_QUERIES = 64
_NEIGHBOURHOODS = 32  # an example is apart from those further off than this part of them all


def neighbour_distances(keys: StoredKeys, example_ids: Tensor, num_neighbors: int, max_bytes: int) -> Tensor:
    """
    Squared L2 distances (S, K) float32 from sampled rows to their nearest rows of *other* examples, ascending.

    Rows of one example share their context, so their distances say nothing about how near a new text's tokens will be;
    nor do those of the examples just before and after it, which in a data set are often of one document. A memory of a
    single example has no others; then its own other rows stand in. Samples that have fewer than K are left out; the
    result is empty where no two rows can be compared.

    Args:
        keys: of N rows.
        example_ids: (N,) int64.
        num_neighbors: K; fewer where no sample has as many.
        max_bytes: bound of the distance matrix in bytes.
    """
    rows = len(keys)
    if rows < 2:
        return torch.zeros(0, num_neighbors)
    sample = torch.linspace(0, rows - 1, min(rows, SAMPLE), dtype=torch.float64).round().long()
    alone = bool((example_ids == example_ids[0]).all())
    group = torch.arange(rows) if alone else _ordinals(example_ids.cpu())
    reach = 0 if alone else int(group.max() + 1) // _NEIGHBOURHOODS
    step = max(1, max_bytes // (4 * max(_QUERIES, keys.width)))
    norms = half_norms(keys, max_bytes)
    nearest = torch.cat(
        [_nearest(keys, norms, part, group, reach, num_neighbors, step, max_bytes) for part in sample.split(_QUERIES)]
    )
    there = nearest.isfinite().sum(dim=1)
    width = min(num_neighbors, int(there.max()))
    return nearest[there >= width, :width]


def _nearest(
    keys: StoredKeys, norms: Tensor, sample: Tensor, group: Tensor, reach: int, k: int, step: int, max_bytes: int
) -> Tensor:
    """Squared distances (S, <= K) from sampled rows to the nearest rows of another group, inf where there are none."""
    queries, own, fetch = keys.floats(sample), group[sample], min(k + SLACK, len(keys))

    def banned(block: slice | Tensor) -> Tensor:
        return (own[:, None] - group[block]).abs() <= reach

    _, ids = least_scores(queries, keys, norms, fetch, step, banned)
    nearest = rescore(queries, keys, ids, fetch, max_bytes)
    distances = nearest.distances.masked_fill(banned(nearest.rows), float("inf"))
    return distances.sort(dim=-1).values[:, :k]


def _ordinals(example_ids: Tensor) -> Tensor:
    """(N,) int64: 0 for the rows of the first example, 1 for those of the next, in the order in which they come."""
    names, index = example_ids.unique(return_inverse=True)
    first = torch.full((len(names),), len(index)).scatter_reduce_(0, index, torch.arange(len(index)), "amin")
    return first.argsort().argsort()[index]


def typical(distances: Tensor) -> float:
    """
    The unit in which a layer measures similarity: the median of these neighbour distances.

    Returns:
        A positive float; 1.0 where there are no distances or all keys coincide. Where more than half of the neighbours
        coincide with their row, the median of the other distances.
    """
    apart = distances[distances > 0]
    if apart.numel() == 0:
        return 1.0
    return distances.median().item() or apart.median().item()
