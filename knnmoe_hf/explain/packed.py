"""A trace as the data of a page: numbers as base64 of typed arrays, each reference text once."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from knnmoe_hf.explain.layers import LayerTrace
from knnmoe_hf.explain.pieces import Pieces, shown
from knnmoe_hf.explain.references import CONTEXT
from knnmoe_hf.explain.trace import RoutingTrace

LARGEST_PAGE = 9_500_000
"""Bytes of data in a page; where all does not fit, fewer neighbours of each token are in it, and less text of each."""
_STEPS = 65_535  # of a number from 0 to its largest value, as it is stored
_RECALLED = 5
_RESERVED = 1_500_000  # bytes for the texts
_LESS_CONTEXT = (6, 3)  # tokens around a neighbour, where even one of each token does not fit with `CONTEXT`


@dataclass
class _Vocabulary:
    """The tokens of a page: each id once, in the order in which they come."""

    pieces: Pieces
    places: dict[int, int] = field(default_factory=dict)
    texts: list[list[str]] = field(default_factory=list)

    def place(self, token_id: int) -> int:
        """Where a token is among `texts`; -1 for none."""
        if token_id < 0:
            return -1
        if token_id not in self.places:
            piece = self.pieces.of(token_id)
            self.places[token_id] = len(self.texts)
            self.texts.append([shown(piece.text), piece.kind[0]])
        return self.places[token_id]


def pack(trace: RoutingTrace, tokenizer=None) -> dict:
    """
    The data of a page, as plain JSON values.

    Args:
        trace: a trace whose context has ended.
        tokenizer: in place of the one of the memory.
    """
    tokenizer = tokenizer if tokenizer is not None else trace.memory.tokenizer
    vocabulary = _Vocabulary(Pieces(tokenizer))
    neighbors, context = _fitting(trace)
    rows = _used_rows(trace, neighbors)
    unknown = torch.full((len(trace),), torch.nan)
    return {
        "sequences": [_base64(sequence.int()) for sequence in _sequences(trace)],
        "ids": _base64(trace.token_ids.int()),
        "tokens": _base64(torch.tensor([vocabulary.place(id) for id in trace.token_ids.tolist()], dtype=torch.int32)),
        "logProb": _base64(trace.log_prob if trace.log_prob is not None else unknown),
        "baseLogProb": _base64(trace.base_log_prob if trace.base_log_prob is not None else unknown),
        "layers": [_layer(layer, found, trace, rows, neighbors) for layer, found in trace.layers.items()],
        "recalled": _recalled(trace, vocabulary),
        "references": _references(trace, rows, vocabulary, context),
        "vocabulary": vocabulary.texts,
        "neighbors": neighbors,
        "context": context,
        "allNeighbors": max((one.rows.shape[1] for one in trace.layers.values()), default=0),
    }


def _fitting(trace: RoutingTrace) -> tuple[int, int]:
    """How many neighbours of each token and layer fit into a page, and how many tokens around each."""
    most = max((one.rows.shape[1] for one in trace.layers.values()), default=1)
    choices = [
        *((neighbors, CONTEXT) for neighbors in range(most, 0, -1)),
        *((1, context) for context in _LESS_CONTEXT),
    ]
    fits = (choice for choice in choices if _bytes(trace, *choice) <= LARGEST_PAGE - _RESERVED)
    return next(fits, choices[-1])


def _bytes(trace: RoutingTrace, neighbors: int, context: int) -> float:
    """About how many bytes a page has with so many neighbours and tokens around each, without the texts of tokens."""
    slots = sum(one.own_experts.shape[1] + one.mixed_experts.shape[1] for one in trace.layers.values())
    found = len(trace) * (20 + 4 * slots + (4 + 8 * neighbors) * len(trace.layers))
    found += len(trace) * (2 + 6 * _RECALLED) if trace.recalled is not None else 0
    source = trace.memory.provenance
    if source is None:
        return 4 / 3 * found
    rows = _used_rows(trace, neighbors).long()
    found += 20 * len(rows)
    if source.has_text and len(rows):
        order = source.positions[rows].argsort()
        order = order[source.example_ids[rows][order].argsort(stable=True)]
        examples, positions = source.example_ids[rows][order], source.positions[rows][order]
        alone = 2 * context + 1
        new = torch.where(examples[1:] == examples[:-1], positions[1:] - positions[:-1], alone).clamp_max(alone)
        found += 2 * (alone + int(new.sum())) + 18 * (1 + int((new == alone).sum()))  # tokens, and a frame of each
    return 4 / 3 * found


def _used_rows(trace: RoutingTrace, neighbors: int) -> Tensor:
    """(R,) the rows that are among so many neighbours of any token, each once, in their order."""
    near = [one.rows[:, :neighbors].flatten() for one in trace.layers.values()]
    rows = torch.cat([torch.zeros(0, dtype=torch.int32), *near]).unique()
    return rows[rows >= 0]


def _sequences(trace: RoutingTrace) -> list[Tensor]:
    """The traced tokens in the order in which they are read; those of no known sequence come last."""
    found = trace.sequences()
    known = torch.zeros(len(trace), dtype=torch.bool)
    for sequence in found:
        known[sequence] = True
    rest = (~known).nonzero().squeeze(-1)
    return [*found, rest] if len(rest) else found


def _layer(layer: int, found: LayerTrace, trace: RoutingTrace, rows: Tensor, neighbors: int) -> dict:
    near = found.rows[:, :neighbors]
    places = torch.searchsorted(rows, near.clamp_min(0)).int().masked_fill(near < 0, -1)
    scale = trace.memory.layers[layer].scale
    return {
        "layer": layer,
        "neighbors": near.shape[1],
        "rows": _base64(places),
        "distances": _fixed(found.distances[:, :neighbors] / (scale if scale > 0 else 1.0)),
        "weights": _fixed(found.weights[:, :neighbors]),
        "confidence": _fixed(found.confidence),
        "divergence": _fixed(found.divergence),
        "own": _experts(found.own_experts, found.own_weights),
        "mixed": _experts(found.mixed_experts, found.mixed_weights),
    }


def _experts(ids: Tensor, weights: Tensor) -> dict:
    return {"slots": ids.shape[1], "ids": _base64(ids), "weights": _fixed(weights)}


def _recalled(trace: RoutingTrace, vocabulary: _Vocabulary) -> dict | None:
    found = trace.recalled
    if found is None:
        return None
    ids = found.ids[:, :_RECALLED]
    places = torch.tensor([[vocabulary.place(id) for id in row] for row in ids.tolist()], dtype=torch.int32)
    return {
        "slots": ids.shape[1],
        "tokens": _base64(places),
        "probabilities": _fixed(found.probabilities[:, :_RECALLED]),
        "weight": _fixed(found.weight),
    }


def _references(trace: RoutingTrace, rows: Tensor, vocabulary: _Vocabulary, context: int) -> dict:
    """Where the rows that are shown come from, and the passages around them, each token of a passage once."""
    source = trace.memory.provenance
    found = {"rows": _base64(rows.int()), "passages": None, "examples": None}
    if source is None:
        return found
    examples, positions = source.example_ids[rows.long()], source.positions[rows.long()]
    found |= {"examples": _base64(examples.double()), "positions": _base64(positions.int())}
    texts = source.tokens()
    passages, passage_of, starts = [], [-1] * len(rows), []
    order = sorted(range(len(rows)), key=lambda place: (int(examples[place]), int(positions[place])))
    current, end = None, -1
    for place in order:
        example, position = int(examples[place]), int(positions[place])
        ids = texts.get(example)
        if ids is None or not 0 <= position < len(ids):
            continue
        start = max(position - context, 0)
        if example != current or start > end:
            passages.append([])
            starts.append(start)
            current, end = example, start
        stop = min(position + 1 + context, len(ids))
        passages[-1] += [vocabulary.place(id) for id in ids[end:stop].tolist()]
        end = max(end, stop)
        passage_of[place] = len(passages) - 1
    if passages:
        kind = "int16" if len(vocabulary.texts) < 2**15 else "int32"
        found["passages"] = [_base64(torch.tensor(one, dtype=getattr(torch, kind))) for one in passages]
        found |= {"passageKind": kind, "starts": starts}
        found["passageOf"] = _base64(torch.tensor(passage_of, dtype=torch.int32))
    return found


def _fixed(values: Tensor) -> dict:
    """Numbers of at least 0 as shares of the largest, in 16 bits; unknown ones as the largest number of 16 bits."""
    known = values.nan_to_num(0.0, posinf=0.0)
    largest = float(known.max()) if known.numel() else 0.0
    steps = (known / (largest or 1.0) * (_STEPS - 1)).round().masked_fill(~values.isfinite(), _STEPS)
    return {"largest": largest, "steps": _base64(steps.to(torch.int32).to(torch.uint16))}


def _base64(values: Tensor | Iterable) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode("ascii")
