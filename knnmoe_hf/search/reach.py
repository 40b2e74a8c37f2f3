"""How far an approximate engine looks: fitted to queries whose neighbours are known, when an index is built."""

import torch
from torch import Tensor

from knnmoe_hf.search.base import Neighbors, StoredKeys

FEWEST = 16
"""Neighbours by which a reach is fitted, at least: the nearest of all is too easily found."""

_SAMPLE, _MOVED = 256, 0.2  # queries, and how far on the way from one key to another


def sample_queries(keys: StoredKeys) -> Tensor:
    """
    (S, c) float32: keys moved a part of the way to another.

    A new text's queries lie further from the keys than these from each other, and are harder to answer. Moved by a
    fifth, keys are as hard: an engine that finds 0.99 of their neighbours found 0.98 to 0.996 of those of held-out
    text in the layers of three models of the lab.
    """
    rows = torch.linspace(0, len(keys) - 1, min(len(keys), _SAMPLE), dtype=torch.float64).long()
    table = keys.floats(rows.to(keys.codes.device))
    return torch.lerp(table, table.roll(len(rows) // 2, dims=0), _MOVED)


def share_found(found: Neighbors, wanted: Neighbors) -> float:
    """
    Share of the wanted neighbours that were found, or others as near.

    Where the last ones are as near as others, these cannot stand for a nearer one that was missed.
    """
    last, k = wanted.distances[:, -1:], wanted.distances.shape[1]
    nearer, there = ((some.distances < last).sum(dim=-1) for some in (found, wanted))
    as_near = (found.distances <= last).sum(dim=-1) - nearer
    return ((nearer.minimum(there) + as_near.minimum(k - there)) / k).mean().item()
