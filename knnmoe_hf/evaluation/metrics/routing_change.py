"""How many tokens another routing sends to other experts, and how far apart the expert weights are."""

import datasets
import evaluate

from knnmoe_hf.evaluation.routing_measures import change_of_routes, layer_tables

_DESCRIPTION = """
For two routings of the same tokens: the share of pairs of a token and a layer whose set of experts is another one, and
the Jensen-Shannon divergence of the expert weights, divided by their sum, in nats (0 to log 2), for each layer.
"""
_INPUTS = """
Args:
    base_expert_ids, expert_ids: before and after: for each token, for each layer, its experts' ids; -1 means none.
    base_expert_weights, expert_weights: likewise their weights; an expert of weight 0 does not count.
Returns:
    changed: share of pairs of a token and a layer whose set of experts is another one.
    changed_by_layer: for each layer.
    divergence: mean of the layers, in nats.
    divergence_by_layer: mean of the tokens, in nats.
"""


class RoutingChange(evaluate.Metric):
    """`changed`, `divergence`, and both by layer."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        weights = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        features = {
            "base_expert_ids": ids,
            "base_expert_weights": weights,
            "expert_ids": ids,
            "expert_weights": weights,
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, *, base_expert_ids, base_expert_weights, expert_ids, expert_weights, **others) -> dict:
        before = layer_tables(base_expert_ids, base_expert_weights)
        after = layer_tables(expert_ids, expert_weights)
        if len(before) != len(after):
            raise ValueError(f"{len(before)} and {len(after)} layers do not pair: give the same layers twice.")
        experts = 1 + max(int(ids.max()) for ids, _ in (*before, *after))
        pairs = {layer: (*one, *other, experts) for layer, (one, other) in enumerate(zip(before, after))}
        change = change_of_routes(pairs)
        return {
            "changed": change.mean_changed,
            "changed_by_layer": list(change.changed.values()),
            "divergence": change.mean_divergence,
            "divergence_by_layer": list(change.divergence.values()),
        }
