"""The unit in which a layer measures similarity: its median neighbour distance."""

import torch
from torch import Tensor

from knnmoe_hf.search.base import SLACK, rescore

SAMPLE = 512
"""Rows that act as queries when the scale is fitted, evenly spread over the memory."""
_QUERIES = 64


def fit_scale(keys: Tensor, example_ids: Tensor, num_neighbors: int, max_bytes: int) -> float:
    """
    The median of the squared L2 distances from rows to their nearest rows of *other* examples.

    Rows of one example share their context, so their distances say nothing about how near a new text's tokens will be.
    A memory of a single example has no others; then its own other rows stand in.

    Args:
        keys: (N, d), any float dtype.
        example_ids: (N,) int64.
        num_neighbors: K; each sampled row contributes its K nearest.
        max_bytes: bound of the distance matrix in bytes.

    Returns:
        A positive float; 1.0 where no two rows can be compared or all keys coincide. Where more than half of the
        neighbours coincide with their row, the median of the other distances.
    """
    rows = keys.shape[0]
    if rows < 2:
        return 1.0
    sample = torch.linspace(0, rows - 1, min(rows, SAMPLE), dtype=torch.float64).round().long()
    alone = bool((example_ids == example_ids[0]).all())
    group = torch.arange(rows) if alone else example_ids.cpu()
    nearest = torch.cat(
        [_nearest_distances(keys, part, group, num_neighbors, max_bytes) for part in sample.split(_QUERIES)]
    )
    known = nearest[nearest.isfinite()]
    apart = known[known > 0]
    if apart.numel() == 0:
        return 1.0
    return known.median().item() or apart.median().item()


def _nearest_distances(keys: Tensor, sample: Tensor, group: Tensor, k: int, max_bytes: int) -> Tensor:
    """Squared distances (S, C) from sampled rows to the nearest rows of another group, inf where there are too few."""
    queries, own, rows = keys[sample].float(), group[sample], keys.shape[0]
    k, fetch = min(k, rows), min(k + SLACK, rows)
    best = torch.full((len(sample), 0), float("inf"))
    ids = torch.zeros(len(sample), 0, dtype=torch.int64)
    step = max(1, max_bytes // (4 * max(len(sample), keys.shape[1])))
    for start in range(0, rows, step):
        block = keys[start : start + step].float()
        scores = torch.addmm(block.square().sum(-1) / 2, queries, block.T, alpha=-1)
        scores.masked_fill_(own[:, None] == group[start : start + step], float("inf"))
        found = torch.arange(start, start + len(block)).expand(len(sample), -1)
        best, ids = torch.cat([best, scores], dim=-1), torch.cat([ids, found], dim=-1)
        best, order = best.topk(min(fetch, best.shape[1]), dim=-1, largest=False)
        ids = ids.gather(-1, order)
    nearest = rescore(queries, keys, ids, fetch, max_bytes)
    distances = nearest.distances.masked_fill(own[:, None] == group[nearest.rows], float("inf"))
    return distances.sort(dim=-1).values[:, :k]
