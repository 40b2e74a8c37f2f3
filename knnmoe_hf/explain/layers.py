"""What a trace keeps of each layer: neighbours, confidence, and experts before and after."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from knnmoe_hf.evaluation.routing_measures import jensen_shannon, over_experts
from knnmoe_hf.lookup.events import LookupEvent
from knnmoe_hf.lookup.mixing import neighbor_weights
from knnmoe_hf.lookup.torch_lookup import TorchLookup

MAX_RECALLED = 16
"""Recalled next tokens that are kept of each token, the most probable ones."""


@dataclass(frozen=True)
class LayerTrace:
    """
    What a layer's memory did to n tokens; K neighbours, k experts before and w after.

    Attributes:
        rows: (n, K) int32, the neighbours, nearest first; -1 for tokens that did not look anything up.
        distances: (n, K) float32, squared L2 between the encoded keys.
        weights: (n, K) float32, of the neighbours' values; each row sums to 1.
        confidence: (n,) float32, lambda; NaN for tokens that did not look anything up.
        own_experts, own_weights: (n, k) int16 and float32, what the gate chose; -1 where there is none.
        mixed_experts, mixed_weights: (n, w), what is used instead; the gate's own where nothing was changed.
        divergence: (n,) float32, Jensen-Shannon divergence of the weights before and after, in nats, 0 to log 2.
    """

    rows: Tensor
    distances: Tensor
    weights: Tensor
    confidence: Tensor
    own_experts: Tensor
    own_weights: Tensor
    mixed_experts: Tensor
    mixed_weights: Tensor
    divergence: Tensor


@dataclass(frozen=True)
class RecalledTrace:
    """
    The next tokens that n tokens recalled, each id once; most probable first.

    Attributes:
        ids: (n, R) int32; -1 where fewer were recalled.
        probabilities: (n, R) float32, of the recalled distribution.
        weight: (n,) float32, the share of the recalled distribution in the distribution that is used.
    """

    ids: Tensor
    probabilities: Tensor
    weight: Tensor


def of_event(event: LookupEvent, lookup: TorchLookup, places: Tensor) -> LayerTrace:
    """What is kept of a lookup, for the tokens at these places (n,)."""

    def at(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.detach()[places.to(tensor.device)].to(dtype).cpu()

    distances = at(event.neighbors.distances, torch.float32)
    own_weights, own_ids = at(event.own[1], torch.float32), at(event.own[2], torch.int64)
    weights, ids = own_weights, own_ids
    if event.mixed is not None:
        weights, ids = at(event.mixed[1], torch.float32), at(event.mixed[2], torch.int64)
    experts = lookup.rows.num_experts
    change = jensen_shannon(over_experts(own_ids, own_weights, experts), over_experts(ids, weights, experts))
    return LayerTrace(
        rows=at(event.neighbors.rows, torch.int32),
        distances=distances,
        weights=neighbor_weights(distances, lookup.rows.scale, lookup.options.temperature),
        confidence=at(event.confidence, torch.float32),
        own_experts=_used(own_ids, own_weights),
        own_weights=own_weights,
        mixed_experts=_used(ids, weights),
        mixed_weights=weights,
        divergence=change.float(),
    )


def recalled_of(event: LookupEvent, places: Tensor) -> RecalledTrace:
    """What is kept of the next tokens that a lookup recalled, for the tokens at these places (n,)."""
    ids, probabilities, weight = event.recalled.at(places).weighted(torch.device("cpu"))
    order = torch.argsort(ids, dim=1, stable=True)
    ids, probabilities = ids.gather(1, order), probabilities.gather(1, order)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    probabilities = probabilities.masked_fill(repeated, 0.0)
    probabilities, best = probabilities.topk(min(MAX_RECALLED, ids.shape[1]), dim=1)
    ids = ids.gather(1, best).masked_fill(probabilities == 0, -1)
    return RecalledTrace(ids.int(), probabilities, weight)


def joined(parts: list[tuple[Tensor, "LayerTrace | RecalledTrace"]], tokens: int):
    """
    One record of all n tokens.

    Args:
        parts: `(numbers (m,) of the tokens, their record)`, at least one.
        tokens: n; those that are in no part have -1 and NaN.
    """
    kind = type(parts[0][1])
    columns = {}
    for field in fields(kind):
        pieces = [getattr(part, field.name) for _, part in parts]
        width = max((piece.shape[1] for piece in pieces if piece.dim() == 2), default=None)
        filler = float("nan") if pieces[0].is_floating_point() else -1
        shape = (tokens,) if width is None else (tokens, width)
        column = torch.full(shape, filler, dtype=pieces[0].dtype)
        for (numbers, _), piece in zip(parts, pieces):
            if width is None:
                column[numbers] = piece
            else:
                column[numbers, : piece.shape[1]] = piece
        columns[field.name] = column
    return kind(**columns)


def _used(ids: Tensor, weights: Tensor) -> Tensor:
    return ids.masked_fill(weights == 0, -1).short()
