"""SteerMoE's rates of activation, and what forces an expert on or off."""

import pytest
import torch
from torch.nn import functional as F

from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.steermoe import ForcedExperts, rates
from knnmoe_hf.calibration.background import machine_background
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.gates import find_gates
from tests.baselines.items import random_items
from tests.baselines.small import check_routes, gate_of, output_of
from tests.support.models import FAMILIES, tiny_model
from tests.support.tokenizers import byte_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_experts_are_just_above_and_just_below_all_others(family):
    gate, logits = gate_of(family), [[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, 3.0, -4.0]]
    override = ForcedExperts(gate, torch.tensor([0.0, -1.0, 0.0, 1.0]))
    found = override(torch.zeros(2, 32), output_of(gate, logits), Tokens(1, 2))
    check_routes(family, found, [[2.0, -1.01, 0.0, 2.01], [0.0, -4.01, 3.0, 3.01]], [[3, 0], [3, 2]])


def test_a_rate_is_the_share_of_tokens_that_chose_an_expert():
    model, texts = tiny_model("qwen3_moe"), [[1, 2, 3], [4, 5, 6, 7, 8]]
    counts = {gate.layer: torch.zeros(gate.num_experts) for gate in find_gates(model)}
    for gate in find_gates(model):
        gate.module.register_forward_hook(
            lambda _, a, o, at=gate.layer: counts.update({at: counts[at] + F.one_hot(o[2], 8).sum((0, 1))})
        )
    found = rates(model, texts)
    assert all(torch.equal(found[layer] * 8, count) for layer, count in counts.items())
    assert all(rate.sum().item() == pytest.approx(2) for rate in found.values())


def test_the_largest_differences_are_forced_and_never_more_on_than_the_top_k():
    gates = find_gates(tiny_model("olmoe"))  # top-2 of 8 in two layers
    difference = {
        0: torch.tensor([0.5, 0.4, 0.3, -0.1, 0, 0, 0, 0]),
        1: torch.tensor([0.2, -0.6, -0.05, 0, 0, 0, 0, 0]),
    }
    found = make_method("steermoe", share_on=4 / 16, share_off=2 / 16)._force(difference, gates)
    assert found["0"].tolist() == [1, 1, 0, -1, 0, 0, 0, 0]
    assert found["1"].tolist() == [1, -1, 0, 0, 0, 0, 0, 0]


@pytest.mark.slow
def test_a_fit_compares_references_with_this_machines_text():
    model, tokenizer, items = tiny_model("gpt_oss", vocab_size=300), byte_tokenizer(), random_items(4)
    method = make_method("steermoe", share_on=0.1, share_off=0.2)
    method.fit(model, items, tokenizer=tokenizer)
    ordinary = [row["input_ids"] for kind in machine_background(tokenizer).values() for row in kind.rows]
    here, there = rates(model, [item.tokens for item in items]), rates(model, ordinary)
    expected = method._force({layer: here[layer] - there[layer] for layer in here}, find_gates(model))
    assert all(torch.equal(method.state()[name], forced) for name, forced in expected.items())
    assert sum(int((forced != 0).sum()) for forced in method.state().values()) == round(1.6) + round(3.2)


def test_it_needs_the_tokenizer():
    with pytest.raises(ValueError, match="give the model's tokenizer"):
        make_method("steermoe").fit(tiny_model("olmoe"), random_items(2))
