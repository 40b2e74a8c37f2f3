"""A trace as a table: one line for each pair of a token and a layer."""

from typing import TYPE_CHECKING

from torch import Tensor

from knnmoe_hf.explain.layers import LayerTrace
from knnmoe_hf.explain.references import ReferenceTexts

if TYPE_CHECKING:
    from knnmoe_hf.explain.trace import RoutingTrace


def columns_of(trace: "RoutingTrace") -> dict[str, list]:
    """See `RoutingTrace.to_dict`."""
    tokens, texts = range(len(trace)), ReferenceTexts(trace.memory)
    of_token = {
        "token": list(tokens),
        "previous": trace.previous.tolist(),
        "token_id": trace.token_ids.tolist(),
        "text": [texts.text([id]) if id >= 0 else None for id in trace.token_ids.tolist()],
    }
    for column in ("log_prob", "base_log_prob", "gain"):
        values = getattr(trace, column)
        of_token[column] = [None] * len(trace) if values is None else _known(values)
    if trace.recalled is not None:
        of_token |= {
            "recalled_ids": _lists(trace.recalled.ids, trace.recalled.ids),
            "recalled_probabilities": _lists(trace.recalled.probabilities, trace.recalled.ids),
            "recalled_weight": _known(trace.recalled.weight),
        }
    of_layer = {layer: _columns(found) for layer, found in trace.layers.items()}
    columns: dict[str, list] = {name: [] for name in (*of_token, "layer", *next(iter(of_layer.values()), {}))}
    for token in tokens:
        for layer, found in of_layer.items():
            values = {name: column[token] for name, column in (of_token | found).items()} | {"layer": layer}
            for name, value in values.items():
                columns[name].append(value)
    return columns


def _columns(found: LayerTrace) -> dict[str, list]:
    return {
        "confidence": _known(found.confidence),
        "divergence": _known(found.divergence),
        "rows": _lists(found.rows, found.rows),
        "distances": _lists(found.distances, found.rows),
        "weights": _lists(found.weights, found.rows),
        "experts": _lists(found.own_experts, found.own_experts),
        "expert_weights": _lists(found.own_weights, found.own_experts),
        "mixed_experts": _lists(found.mixed_experts, found.mixed_experts),
        "mixed_expert_weights": _lists(found.mixed_weights, found.mixed_experts),
    }


def _known(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _lists(values: Tensor, ids: Tensor) -> list[list]:
    """The values (n, m) of each token, without those where `ids` (n, m) is -1."""
    return [row[used].tolist() for row, used in zip(values, ids >= 0)]
