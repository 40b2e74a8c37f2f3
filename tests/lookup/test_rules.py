"""Routing rules: their formulas by hand, what limits a choice, and that they can be copied and moved."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

from knnmoe_hf.lookup.rules import ExpertGroups, RoutingRule, softmax_topk, topk_softmax

E, T = 8, 40
BIAS = 0.3 * torch.randn(E, generator=torch.Generator().manual_seed(1))
GROUPS = ExpertGroups(size=2, open=2)
RULES = {
    "DeepSeek-V2": RoutingRule(in_order=False, factor=2.5, groups=replace(GROUPS, judged_by=1, closed_score=0.0)),
    "DeepSeek-V3": RoutingRule("sigmoid", renormalized=True, added_to_sum=1e-20, factor=2.5, groups=GROUPS, bias=BIAS),
    "ERNIE": RoutingRule(renormalized=True, least_sum=0.5, bias=BIAS / 10),
    "Cohere": RoutingRule("sigmoid", of_chosen=True, renormalized=True),
    "DeepSeek-V4": RoutingRule("sqrtsoftplus", renormalized=True, bias=BIAS),
}


def logits_of(rows: int = T) -> torch.Tensor:
    return torch.randn(rows, E, generator=torch.Generator().manual_seed(0))


def by_hand(rule: RoutingRule, z: list[float], k: int) -> dict[int, float]:
    """{expert: weight} of one token, in plain Python."""
    score = {
        "softmax": lambda x: math.exp(x) / sum(map(math.exp, z)),
        "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
        "sqrtsoftplus": lambda x: math.sqrt(math.log1p(math.exp(x))),
    }[rule.scores]
    bias = [0.0] * E if rule.bias is None else rule.bias.tolist()
    ranks = [(x if rule.of_chosen else score(x)) + b for x, b in zip(z, bias)]
    allowed = list(range(E))
    if rule.groups is not None:
        size, judged = rule.groups.size, rule.groups.judged_by
        groups = [list(range(start, start + size)) for start in range(0, E, size)]
        value = {g: sum(sorted((ranks[e] for e in group), reverse=True)[:judged]) for g, group in enumerate(groups)}
        best = sorted(value, key=value.get, reverse=True)[: rule.groups.open]
        allowed = [e for g in best for e in groups[g]]
    chosen = sorted(allowed, key=lambda e: -ranks[e])[:k]
    weights = {e: score(z[e]) for e in chosen}
    total = max(sum(weights.values()) + rule.added_to_sum, rule.least_sum) if rule.renormalized else 1.0
    return {e: w / total * rule.factor for e, w in weights.items()}


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_its_formula(name, k):
    rule, logits = RULES[name], logits_of()
    weights, ids = rule(logits, k)
    assert weights.shape == ids.shape == (T, k) and ids.dtype == torch.int64
    for token in range(T):
        found = dict(zip(ids[token].tolist(), weights[token].tolist()))
        assert found == pytest.approx(by_hand(rule, logits[token].tolist(), k), rel=1e-4)


def test_weights_come_in_the_dtype_in_which_they_are_computed_and_are_cast_by_the_caller():
    logits = logits_of().bfloat16()
    assert softmax_topk(logits, 2)[0].dtype == torch.float32
    assert topk_softmax(logits, 2)[0].dtype == torch.bfloat16
    assert softmax_topk.routed(logits, 2, torch.bfloat16)[0].dtype == torch.bfloat16
    # a bias in float32 beside scores in bfloat16 decides the choice alone
    rule = RoutingRule("sigmoid", float32=False, bias=BIAS)
    weights, ids = rule(logits, 2)
    assert weights.dtype == torch.bfloat16 and torch.equal(weights, logits.sigmoid().gather(1, ids))


@pytest.mark.parametrize("name", RULES)
def test_a_gradient_reaches_the_logits_of_every_chosen_expert_through_the_rule(name):
    rule, logits = RULES[name], logits_of().double().requires_grad_()
    weights, ids = rule(logits, 3)
    (weights * torch.arange(1.0, 4.0)).sum().backward()
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    assert (logits.grad[chosen] != 0).all()
    if rule.scores != "softmax":
        assert not logits.grad[~chosen].any()


def test_groups_limit_how_many_experts_make_sense():
    assert softmax_topk.widest(2, E) == E
    assert RULES["DeepSeek-V3"].widest(2, E) == 4 and RULES["DeepSeek-V3"].widest(6, E) == 6


def test_a_rule_is_a_value_that_can_be_copied_and_moved():
    rule = RULES["DeepSeek-V3"]
    for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule)), rule.to("cpu")):
        assert other == rule and hash(other) == hash(rule) and torch.equal(other.bias, rule.bias)
        assert all(torch.equal(a, b) for a, b in zip(other(logits_of(), 2), rule(logits_of(), 2)))
    assert rule.to("meta").bias.device.type == "meta" and softmax_topk.to("meta") is softmax_topk
    assert replace(rule, factor=1.0) != rule


def test_a_name_says_what_a_rule_does_and_other_scores_are_refused():
    names = [rule.name for rule in (softmax_topk, topk_softmax, *RULES.values())]
    assert names[0] == "softmax_topk" and names[1] == "topk_softmax"
    assert names[3] == "sigmoid_topk_biased_grouped_renormalized_scaled" and len(set(names)) == len(names)
    with pytest.raises(ValueError, match="scores='Tanh' is not allowed: use one of softmax, sigmoid, sqrtsoftplus"):
        RoutingRule("Tanh")
