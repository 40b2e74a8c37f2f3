"""The supported model families.

To add a family, add a row to `FAMILIES`; if its router picks experts by another rule, add the rule as a function to
`knnmoe_hf.lookup.rules`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from knnmoe_hf.lookup.rules import RoutingRule, softmax_topk, softmax_topk_renormalized, topk_softmax


def _by_norm_topk_prob(gate: nn.Module) -> RoutingRule:
    return softmax_topk_renormalized if gate.norm_topk_prob else softmax_topk


@dataclass(frozen=True)
class Family:
    """One row of the table of supported families."""

    name: str  # for error messages
    router_class: str  # name of the router's class in transformers
    rule_of: Callable[[nn.Module], RoutingRule]  # from a router to the rule by which it turns logits into experts


FAMILIES = (
    Family("OLMoE", "OlmoeTopKRouter", _by_norm_topk_prob),
    Family("Qwen3-MoE", "Qwen3MoeTopKRouter", _by_norm_topk_prob),
    Family("GPT-OSS", "GptOssTopKRouter", lambda gate: topk_softmax),
)
