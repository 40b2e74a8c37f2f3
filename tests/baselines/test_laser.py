"""LASER's choice among candidates by load, on top of what is in force."""

import pytest
import torch

from knnmoe_hf import attach_memory
from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.laser import LeastLoaded
from knnmoe_hf.evaluation.routing import record_routing
from knnmoe_hf.lookup.sequence import Tokens
from tests.baselines.small import check_routes, gate_of, output_of
from tests.support.models import FAMILIES, random_memory, tiny_model

IDS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flat_token_gets_the_least_loaded_candidates(family):
    gate = gate_of(family)
    # the first token is sure of 0 and 1; the second has 0, 1 and 2 as candidates, of which 2 has no load, and 0 the
    # higher score of the others
    logits = [[3.1, 3.0, -3.0, -3.0], [1.0, 0.9, 0.8, -5.0]]
    output = output_of(gate, logits)
    assert output[2].tolist() == [[0, 1], [0, 1]]
    found = LeastLoaded(gate, None, make_method("laser"))(torch.zeros(2, 32), output, Tokens(1, 2))
    check_routes(family, found, logits, [[0, 1], [0, 2]])
    assert torch.equal(found[0], output[0])


def test_padding_loads_nothing_and_few_candidates_leave_the_top_k():
    gate, logits = gate_of("qwen3_moe"), [[3.1, 3.0, -3.0, -3.0], [1.0, 0.9, 0.8, -5.0]]
    output, x = output_of(gate, logits), torch.zeros(2, 32)
    override = LeastLoaded(gate, None, make_method("laser"))
    assert override(x, output, Tokens(1, 2, real=torch.tensor([False, True])))[2].tolist() == [[0, 1], [0, 1]]
    override = LeastLoaded(gate, None, make_method("laser", threshold=0.95))  # 0 alone
    assert override(x, output, Tokens(1, 2))[2].tolist() == [[0, 1], [0, 1]]
    override = LeastLoaded(gate, None, make_method("laser", candidates=1))
    assert override(x, output, Tokens(1, 2))[2].tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3"])
@pytest.mark.parametrize("with_memory", [False, True])
def test_it_keeps_what_is_in_force_where_tokens_are_sure_and_balances_the_rest(family, with_memory):
    model = tiny_model(family)
    if with_memory:
        attach_memory(model, random_memory(model))
    with torch.no_grad(), record_routing(model) as before:
        expected = model(input_ids=IDS).logits
    with torch.no_grad(), make_method("laser", confident=0.0).apply(model), record_routing(model) as sure:
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert before.change_to(sure).is_none
    with (
        torch.no_grad(),
        make_method("laser", confident=9.0, threshold=0.0).apply(model),
        record_routing(model) as flat,
    ):
        model(input_ids=IDS)
    assert before.change_to(flat).mean_changed > 0.1
    width = {layer: routes.ids.shape[1] for layer, routes in before.routes.items()}
    assert {layer: routes.ids.shape[1] for layer, routes in flat.routes.items()} == width
    first = min(width)  # later layers see other inputs
    assert flat.counts[first].float().std() < before.counts[first].float().std()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_memory_that_widens_routes_is_refused():
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model, value_space="assignment", routing_width="union"))
    with make_method("laser").apply(model), pytest.raises(ValueError, match="laser cannot balance"):
        model(input_ids=IDS)
