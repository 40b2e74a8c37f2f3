"""How evenly tokens are spread over the experts of each layer."""

import datasets
import evaluate
import torch

from knnmoe_hf.errors import shown
from knnmoe_hf.evaluation.routing_measures import layer_tables, load_of_counts

_DESCRIPTION = """
For each layer, from the number of tokens that use each expert: the coefficient of variation (0 if all are equal), the
most used expert over the mean (at least 1), and the entropy of the shares over log E (1 if all are equal).
"""
_INPUTS = """
Args:
    expert_ids: for each token, for each layer, the ids of its experts; -1 means no expert.
    expert_weights: likewise their weights; an expert of weight 0 does not count.
    num_experts: E, experts of a layer.
Returns:
    load_variation, load_max_over_mean, load_entropy: means of the layers.
    load_variation_by_layer, load_max_over_mean_by_layer, load_entropy_by_layer: for each layer.
"""


class ExpertLoad(evaluate.Metric):
    """`load_variation`, `load_max_over_mean`, `load_entropy`, and all by layer."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "expert_ids": datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
            "expert_weights": datasets.Sequence(datasets.Sequence(datasets.Value("float64"))),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, *, expert_ids, expert_weights, num_experts: int | None = None, **others) -> dict:
        tables = layer_tables(expert_ids, expert_weights)
        largest = max(int(ids.max()) for ids, _ in tables)
        if not isinstance(num_experts, int) or num_experts <= largest:
            raise ValueError(
                f"num_experts={shown(num_experts)} is not allowed: call compute(num_experts=...) with the number of "
                f"experts of a layer, which is above the largest id, {largest}."
            )
        counts = [torch.bincount(ids[weights != 0], minlength=num_experts) for ids, weights in tables]
        loads = [load_of_counts(one) for one in counts]
        found = {}
        for name in ("variation", "max_over_mean", "entropy"):
            values = [getattr(load, name) for load in loads]
            found |= {f"load_{name}": sum(values) / len(values), f"load_{name}_by_layer": values}
        return found
