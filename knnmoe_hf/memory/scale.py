"""The unit in which a layer measures similarity: its median neighbour distance."""

import torch
from torch import Tensor

SAMPLE = 512
"""Rows that act as queries when the scale is fitted, evenly spread over the memory."""


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
        A positive float; 1.0 for fewer than two rows or where all keys coincide.
    """
    rows = keys.shape[0]
    if rows < 2:
        return 1.0
    sample = torch.linspace(0, rows - 1, min(rows, SAMPLE), dtype=torch.float64).round().long()
    alone = bool((example_ids == example_ids[0]).all())
    group = torch.arange(rows) if alone else example_ids.cpu()
    nearest = _nearest_distances(keys, sample, group, num_neighbors, max_bytes)
    finite = nearest[nearest.isfinite()]
    median = finite.median().item() if finite.numel() else 0.0
    return median if median > 0 else 1.0


def _nearest_distances(keys: Tensor, sample: Tensor, group: Tensor, k: int, max_bytes: int) -> Tensor:
    """Squared distances (S, K) from sampled rows to the nearest rows of another group, inf where there are too few."""
    queries, own = keys[sample].float(), group[sample]
    best = torch.full((len(sample), k), float("inf"), device=keys.device)
    step = max(1, max_bytes // (4 * max(len(sample), keys.shape[1])))
    for start in range(0, keys.shape[0], step):
        block = keys[start : start + step].float()
        distances = (queries.square().sum(-1)[:, None] + block.square().sum(-1) - 2 * queries @ block.T).clamp_min_(0)
        same = own[:, None] == group[start : start + step]
        distances.masked_fill_(same.to(distances.device), float("inf"))
        best = torch.cat([best, distances], dim=-1).topk(k, dim=-1, largest=False).values
    return best
