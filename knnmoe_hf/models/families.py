"""The supported families: a new one is a row of `FAMILIES`, a new rule a function in `knnmoe_hf.lookup.rules`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from knnmoe_hf.lookup.rules import RoutingRule, softmax_topk, softmax_topk_renormalized, topk_softmax


def _by_norm_topk_prob(gate: nn.Module) -> RoutingRule:
    return softmax_topk_renormalized if gate.norm_topk_prob else softmax_topk


@dataclass(frozen=True)
class Family:
    """One row of the support table: a router class of transformers and the rule that its instances follow."""

    name: str
    router_class: str
    rule_of: Callable[[nn.Module], RoutingRule]


FAMILIES = (
    Family("OLMoE", "OlmoeTopKRouter", _by_norm_topk_prob),
    Family("Qwen3-MoE", "Qwen3MoeTopKRouter", _by_norm_topk_prob),
    Family("GPT-OSS", "GptOssTopKRouter", lambda gate: topk_softmax),
)
