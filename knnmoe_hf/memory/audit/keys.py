"""Keys that attract queries from everywhere, rows that are there many times, and an encoder that moves queries."""

from dataclasses import dataclass

import torch
from torch import Tensor

from knnmoe_hf.lookup.blocks import BLOCK
from knnmoe_hf.lookup.codecs import KeyEncoder
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.values import ValueTable
from knnmoe_hf.search import StoredKeys
from knnmoe_hf.search.scores import half_norms, least_scores

QUERIES = 256
"""Queries of each of the two kinds that the rows compete for."""
_MAX_BYTES = 2**26
_SAMPLE, _NEAREST = 4096, 0.9
_CROWDED = 0.5  # of the mean square distance to the query; more than 1 where neighbours lie all around
_REACH = 1.3  # times the median distance of these neighbours from their middle: in many dimensions nearly all
_TIE = 1.02  # rows so little further away than the k-th neighbour count too: of many equal keys, all are meant
_NEAR = 0.05  # queries closer than this many distance scales to a row are of its own kind, and not attracted


@dataclass(frozen=True)
class Attraction:
    """
    Which rows queries find, that need not be like them.

    Attributes:
        share: (N,) float32, the share of queries of which each row is a neighbour without being near: the larger one
            of two, of queries that are rows of other examples, and of queries halfway between two rows, which are
            unlike any reference.
        crowded: the share of the latter whose neighbours lie much closer to each other than to the query.
        crowd: (N,) bool, the rows among which these neighbours lie.
    """

    share: Tensor
    crowded: float
    crowd: Tensor


def attraction(rows: LayerRows, example_ids: Tensor, k: int, asked: Tensor) -> Attraction:
    """
    How many queries the rows attract.

    Args:
        rows: of a layer, N at least 2.
        example_ids: (N,) int64; rows of a query's own example do not count.
        k: neighbours of a query.
        asked: (n,) int64, the rows that queries are made of.
    """
    keys, n = rows.stored_keys, len(asked)
    sample = asked[torch.linspace(0, n - 1, min(n, QUERIES), dtype=torch.float64).round().long()]
    one, other = asked[torch.randint(n, (2, QUERIES), generator=torch.Generator().manual_seed(0))]
    between, norms = (keys.floats(one) + keys.floats(other)) / 2, half_norms(keys, _MAX_BYTES)
    near, nothing = _NEAR * rows.scale, torch.full((QUERIES,), -1)
    share, _ = _share(keys, norms, keys.floats(sample), example_ids[sample], example_ids, k, near)
    unlike, found = _share(keys, norms, between, nothing, torch.zeros_like(example_ids), k, near)
    return Attraction(torch.maximum(share, unlike), *_crowd(keys, between, found))


def _crowd(keys: StoredKeys, queries: Tensor, found: Tensor) -> tuple[float, Tensor]:
    """`crowded` and `crowd` of queries (Q, c) and their neighbours (Q, k)."""
    nobody = torch.zeros(len(keys), dtype=torch.bool)
    if found.shape[1] < 2 or len(keys) < 4 * found.shape[1]:
        return 0.0, nobody
    parts = [keys.floats(some) for some in found.split(32)]  # (q, k, c)
    centres = torch.cat([part.mean(dim=1) for part in parts])
    # the mean square of the neighbours' distances to their centre is (k - 1) / 2k of that between them
    within = torch.cat([(part - part.mean(dim=1, keepdim=True)).square().sum(dim=2).mean(dim=1) for part in parts])
    away = within + (queries - centres).square().sum(dim=1)  # mean square distance to the query
    crowded = 2 * found.shape[1] / (found.shape[1] - 1) * within < _CROWDED * away
    if not bool(crowded.any()):
        return 0.0, nobody
    middle = centres[crowded].median(dim=0).values
    reach = torch.cat([(keys.floats(some) - middle).norm(dim=-1).flatten() for some in found[crowded].split(32)])
    radius = _REACH * reach.median()
    blocks = [slice(start, start + BLOCK) for start in range(0, len(keys), BLOCK)]
    crowd = torch.cat([(keys.floats(block) - middle).norm(dim=1) <= radius for block in blocks])
    return float(crowded.float().mean()), crowd


def _share(
    keys: StoredKeys, norms: Tensor, queries: Tensor, own: Tensor, groups: Tensor, k: int, near: float
) -> tuple[Tensor, Tensor]:
    """The share of queries (Q, c) that each row attracts, (N,), and the queries' neighbours (Q, k)."""
    step = max(1, _MAX_BYTES // (4 * max(len(queries), keys.width)))

    def excluded(block: slice) -> Tensor:
        return own[:, None] == groups[block]

    found, neighbors = least_scores(queries, keys, norms, min(k, len(keys)), step, excluded)
    half = queries.square().sum(dim=1) / 2
    farthest = found.masked_fill(found.isinf(), -torch.inf).amax(dim=1)  # the k-th, or the last that there is
    limit = _TIE * (farthest + half) - half
    counts = []
    for start in range(0, len(keys), step):
        block = slice(start, start + step)
        scores = torch.addmm(norms[block], queries, keys.floats(block).T, alpha=-1)  # (Q, n)
        caught = (scores <= limit[:, None]) & (scores + half[:, None] > near / 2) & ~excluded(block)
        counts.append(caught.float().mean(dim=0))
    return torch.cat(counts), neighbors


def spread(rows: LayerRows) -> tuple[Tensor, Tensor, Tensor]:
    """
    Where the keys lie: their middle (c,) and standard deviations (c,), and each key's distance from the middle, (N,).

    Middle and deviations are those of a sample without its farthest rows, so that a few far away do not move them.
    """
    keys, n = rows.stored_keys, len(rows.key_codes)
    sample = keys.floats(torch.linspace(0, n - 1, min(n, _SAMPLE), dtype=torch.float64).round().long())
    middle = sample.median(dim=0).values
    away = (sample - middle).double().norm(dim=1)
    deviation = sample[away <= away.quantile(_NEAREST)].std(dim=0, correction=0)
    blocks = [slice(start, start + BLOCK) for start in range(0, n, BLOCK)]
    return middle, deviation, torch.cat([(keys.floats(block) - middle).double().norm(dim=1) for block in blocks])


def group_sizes(*tables: Tensor | None) -> Tensor:
    """(N,) int64, how many rows have the same bytes as this one in all of these tables (N, ...)."""
    total = sum(_hashes(table) for table in tables if table is not None)
    _, group, size = total.unique(return_inverse=True, return_counts=True)
    return size[group]


def value_tables(values: ValueTable) -> list[Tensor]:
    """The tables that a layer's values are stored in."""
    return [table for table in (values.codes, values.experts, values.default_value) if table is not None]


def _hashes(table: Tensor) -> Tensor:
    """(N,) int64 of the bytes of each row: equal for equal rows, and for others as good as never."""
    rows = table.reshape(len(table), -1)
    generator = torch.Generator().manual_seed(rows.shape[1])
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1] * rows.element_size(),), generator=generator)
    parts = [(part.contiguous().view(torch.uint8).long() * factors).sum(dim=1) for part in rows.split(BLOCK)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def encoder_fault(encoder: KeyEncoder) -> str | None:
    """
    How an encoder differs from those that `knnmoe_hf.lookup.codecs.fit_keys` fits, as a clause; None if it does not.

    It fits orthogonal axes, stretched by 1 to 100, on which the mean input is 0. With others, queries need not come
    out where the keys of like text are: an encoder that shrinks gives all queries the same neighbours.
    """
    if encoder.weight is None:
        return None
    lengths = encoder.weight.norm(dim=1)
    if not (0.9 < float(lengths.min()) and float(lengths.max()) < 110):
        return f"its axes have lengths from {lengths.min():.3g} to {lengths.max():.3g}, where 1 to 100 are fitted"
    axes = encoder.weight / lengths[:, None]
    off = (axes @ axes.T).fill_diagonal_(0).abs().max()
    if float(off) > 0.2:
        return f"two of its axes have a cosine of {off:.2f}, where orthogonal ones are fitted"
    bias, expected = encoder.bias, -(encoder.weight @ encoder.mean)
    if float((bias - expected).norm()) > 0.05 * float(expected.norm() + 1):
        return "its bias does not take the mean input to 0"
    return None
