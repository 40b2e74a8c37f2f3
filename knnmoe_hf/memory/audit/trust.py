"""How far a memory opens for text that is nothing like its references, and next tokens that say nothing."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from knnmoe_hf.lookup.confidence import InContext
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.make import fit_for, make_confidences
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.memory.audit.keys import spread
from knnmoe_hf.search.scores import half_norms, least_scores

_TOKENS = 128
_TOKENS_LOOKED_AT, _ROWS_OF_TOKEN, _LEAST_ROWS = 10, 64, 24
_FAR = 3.0  # standard deviations, in every dimension
_MAX_BYTES = 2**26


def confidence_far_away(
    layers: Mapping[int, LayerRows], options: RetrievalOptions, fits: Mapping[str, RecallFit]
) -> dict[int, float]:
    """
    The mean confidence of each layer on a sequence that is nothing like the references.

    Its queries are drawn around the middle of the keys, three times as far out in every dimension as the keys are. In
    the last layer it is the larger one of the confidence in the routing and in recalled tokens.

    Args:
        layers: of N rows, N at least 1.
        options, fits: as of `knnmoe_hf.lookup.make.make_lookups`.
    """
    fit = fit_for(layers, options, fits)
    confidences = make_confidences(layers, options, fit)
    tokens, found = Tokens(1, _TOKENS), {}
    generator = torch.Generator().manual_seed(0)
    for layer, rows in sorted(layers.items()):
        keys, (middle, deviation, _) = rows.stored_keys, spread(rows)
        queries = middle + _FAR * deviation * torch.randn(_TOKENS, keys.width, generator=generator)
        step = max(1, _MAX_BYTES // (4 * max(_TOKENS, keys.width)))
        k = min(options.num_neighbors, len(keys))
        scores, _ = least_scores(queries, keys, half_norms(keys, _MAX_BYTES), k, step)
        distances = (2 * scores + queries.square().sum(dim=1, keepdim=True)).clamp_min(0)
        confidence = confidences[layer]
        similar = confidence.similarity(distances)
        opened = confidence(similar, tokens)
        if fit is not None and layer == max(layers) and isinstance(confidence, InContext):
            opened = torch.maximum(opened, confidence.reopened(similar, tokens, fit.threshold, fit.width))
        found[layer] = float(opened.mean())
    return found


class FrequentToken(NamedTuple):
    """
    A token that follows many rows.

    Attributes:
        token: its id.
        share: of the rows that it follows.
        lift: how much more often it follows the neighbours of rows that it follows than it follows any row; 1 where
            keys do not tell which rows it follows.
    """

    token: int
    share: float
    lift: float


def frequent_tokens(
    rows: LayerRows, next_tokens: Tensor, example_ids: Tensor, k: int, suspicious: Tensor
) -> list[FrequentToken]:
    """
    The tokens that follow at least one in a hundred rows, and `_LEAST_ROWS` of them; at most ten, most frequent first.

    The keys of the last layer are what the model predicts the next token from, so that rows with one next token lie
    together there, whatever the text.

    Args:
        rows: of the last layer, N rows.
        next_tokens, example_ids: (N,).
        k: neighbours of a row, of other examples, that are looked at.
        suspicious: (N,) bool, rows that are not asked, nor looked at as neighbours: their keys may tell nothing.
    """
    keys, n, found = rows.stored_keys, len(next_tokens), []
    norms, step = half_norms(keys, _MAX_BYTES), max(1, _MAX_BYTES // (4 * max(_ROWS_OF_TOKEN, keys.width)))
    ids, counts = next_tokens.unique(return_counts=True)
    for place in counts.argsort(descending=True, stable=True)[:_TOKENS_LOOKED_AT].tolist():
        token, count = int(ids[place]), int(counts[place])
        if count < max(_LEAST_ROWS, n / 100):
            break
        members = ((next_tokens == token) & ~suspicious).nonzero()[:, 0]
        if not len(members):
            continue
        places = torch.linspace(0, len(members) - 1, min(len(members), _ROWS_OF_TOKEN), dtype=torch.float64)
        asked = members[places.round().long()]
        own = example_ids[asked][:, None]

        def excluded(block: slice, own: Tensor = own) -> Tensor:
            return (own == example_ids[block]) | suspicious[block]

        scores, near = least_scores(keys.floats(asked), keys, norms, min(k, n), step, excluded)
        alike = (next_tokens[near] == token)[scores.isfinite()].float()
        if len(alike):
            found.append(FrequentToken(token, count / n, float(alike.mean()) * n / count))
    return found
