"""Measures of routing: how it differs between two runs over the same tokens, and how evenly it uses the experts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_ID = 32_767  # what int16 holds, far above any model's
_ROWS = 4096  # tokens whose weights over all experts are in memory at once


@dataclass(frozen=True)
class RoutingChange:
    """
    What differs between two routings of the same tokens.

    Attributes:
        changed: `{layer: share of tokens whose set of experts is another one}`.
        divergence: `{layer: mean Jensen-Shannon divergence of a token's expert weights, in nats}`, from 0 to log 2.
        tokens: how many were compared in each layer.
        largest: the largest change of the weight that a token gives an expert.
    """

    changed: dict[int, float]
    divergence: dict[int, float]
    tokens: int
    largest: float

    @property
    def is_none(self) -> bool:
        """Whether blocks get the same experts with the same weights, to the bit."""
        return self.largest == 0

    @property
    def mean_changed(self) -> float:
        """Share of pairs of a token and a layer whose set of experts is another one."""
        return sum(self.changed.values()) / len(self.changed)

    @property
    def mean_divergence(self) -> float:
        """Mean over the layers, in nats."""
        return sum(self.divergence.values()) / len(self.divergence)


@dataclass(frozen=True)
class Load:
    """
    How evenly the tokens of a layer are spread over its experts.

    Attributes:
        variation: coefficient of variation of the experts' shares, 0 if all are equal: standard deviation (of all
            experts, not of a sample) over mean.
        max_over_mean: share of the most used expert over the mean share, at least 1.
        entropy: of the shares, over log E: 1 if all are equal, 0 if one expert gets all.
    """

    variation: float
    max_over_mean: float
    entropy: float


Pair = tuple[Tensor, Tensor, Tensor, Tensor, int]
"""Of one layer: ids and weights (T, w) before, ids and weights (T, v) after, and the number of experts."""


def change_of_routes(pairs: Mapping[int, Pair]) -> RoutingChange:
    """
    Compares two routings.

    Args:
        pairs: `{layer: Pair}`, at least one. An id of -1, or a weight of 0, is not an expert.

    Raises:
        ValueError: if there is no token.
    """
    tokens = min((len(pair[0]) for pair in pairs.values()), default=0)
    if not tokens:
        raise ValueError("there is no token whose routing could be compared: record at least one.")
    changed, divergence, largest = {}, {}, torch.zeros((), dtype=torch.float64)
    for layer, (ids, weights, new_ids, new_weights, num_experts) in pairs.items():
        other_set, total = 0, 0.0
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            before = over_experts(ids[rows], weights[rows], num_experts)
            after = over_experts(new_ids[rows], new_weights[rows], num_experts)
            other_set += int(((before != 0) != (after != 0)).any(-1).sum())
            largest = torch.maximum(largest, (after - before).abs().max())
            total += jensen_shannon(before, after).sum().item()
        changed[layer], divergence[layer] = other_set / len(ids), total / len(ids)
    return RoutingChange(changed, divergence, tokens, largest.item())


def layer_tables(
    ids: Sequence[Sequence[Sequence[int]]], weights: Sequence[Sequence[Sequence[float]]]
) -> list[tuple[Tensor, Tensor]]:
    """
    For each layer ids (T, w) int64 and weights (T, w) float64; a missing expert has id -1 and weight 0.

    Args:
        ids, weights: for each token, for each layer, one for each of its experts, of which there may be any number.

    Raises:
        ValueError: if there is no token, if tokens differ in their layers, or ids from weights in their number, or for
            an id or a weight that no gate gives.
    """
    shapes = [[len(layer) for layer in token] for token in ids]
    if not shapes:
        raise ValueError("there is no token whose routing could be measured: give at least one.")
    if shapes != [[len(layer) for layer in token] for token in weights]:
        raise ValueError("expert ids and weights do not pair: give as many weights as ids for each token and layer.")
    layers = {len(token) for token in shapes}
    if len(layers) != 1 or layers == {0}:
        raise ValueError(f"tokens have {sorted(layers)} layers: give every token the same layers, at least one.")
    tables = []
    for layer in range(*layers):
        width = max(1, *(token[layer] for token in shapes))
        table = [
            torch.tensor([[*t[layer], *[filler] * (width - len(t[layer]))] for t in rows], dtype=dtype)
            for rows, filler, dtype in ((ids, -1, torch.int64), (weights, 0.0, torch.float64))
        ]
        tables.append((table[0], table[1].masked_fill(table[0] < 0, 0.0)))
    for experts, shares in tables:
        if experts.min() < -1 or experts.max() > _LARGEST_ID:
            raise ValueError(
                f"expert ids from {experts.min()} to {experts.max()} are not allowed: use 0 to {_LARGEST_ID}, and -1 "
                "for none."
            )
        if not (shares.isfinite() & (shares >= 0)).all():
            raise ValueError("there is an expert weight that is negative, infinite or not a number: use 0 or more.")
    return tables


def over_experts(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """(T, E) float64: each expert's weight, 0 for those that a token is not given, from ids and weights (T, w)."""
    table = torch.zeros(len(ids), num_experts + 1, dtype=torch.float64)
    slots = ids.long().masked_fill(ids < 0, num_experts)
    return table.scatter_add(1, slots, weights.double())[:, :num_experts]


def jensen_shannon(before: Tensor, after: Tensor) -> Tensor:
    """
    (T,) the Jensen-Shannon divergence of two distributions, in nats: from 0 to log 2 (Lin 1991).

    Args:
        before, after: (T, E), not negative; each row is divided by its sum. A row of zeros, a token without experts,
            has divergence 0 from another one, and log 2 from all others.
    """
    sums = [table.sum(-1, keepdim=True) for table in (before, after)]
    p, q = (table / total.clamp_min(torch.finfo(table.dtype).tiny) for table, total in zip((before, after), sums))
    middle = (p + q) / 2

    def towards_middle(one: Tensor) -> Tensor:
        return torch.where(one > 0, one * (one / middle.clamp_min(torch.finfo(one.dtype).tiny)).log(), 0.0).sum(-1)

    found = (towards_middle(p) + towards_middle(q)) / 2
    is_alone = (sums[0] > 0) != (sums[1] > 0)
    return torch.where(is_alone.squeeze(-1), math.log(2), found.clamp_min(0.0))


def load_of_counts(counts: Tensor) -> Load:
    """
    The balance of a layer.

    Args:
        counts: (E,) how many tokens used each expert.

    Raises:
        ValueError: if no token used any.
    """
    shares = counts.double() / counts.sum().clamp_min(1)
    if not counts.sum():
        raise ValueError("no token was routed to any expert, so there is no load: record at least one.")
    used = shares[shares > 0]
    mean = 1 / len(shares)
    entropy = 1.0 if len(shares) == 1 else -(used * used.log()).sum().item() / math.log(len(shares))
    return Load(shares.std(correction=0).item() / mean, shares.max().item() / mean, max(0.0, entropy))
