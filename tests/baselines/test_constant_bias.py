"""A constant bias is added to the logits of every token, and fitted by AdamW on the references' loss."""

import pytest
import torch

from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.constant_bias import AddedBias, added_biases
from knnmoe_hf.baselines.tuning import next_token_loss
from knnmoe_hf.evaluation import score
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.tasks.items import rows_of
from tests.baselines.items import random_items
from tests.baselines.small import check_routes, gate_of, output_of
from tests.support.models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_is_added_and_the_family_routes_the_sum(family):
    gate, logits = gate_of(family), [[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, 3.0, -4.0]]
    output = output_of(gate, logits)
    assert output[2].tolist() == [[0, 1], [2, 1]]
    found = AddedBias(gate, torch.tensor([0.0, 0.0, 0.0, 4.0]))(torch.zeros(2, 32), output, Tokens(1, 2))
    check_routes(family, found, [[2.0, 1.0, 0.0, 3.0], [0.0, 0.5, 3.0, 0.0]], [[3, 0], [2, 1]])
    assert found[0].tolist() == [[2.0, 1.0, 0.0, 3.0], [0.0, 0.5, 3.0, 0.0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_goes_a_rate_against_the_gradient(family):
    model, items = tiny_model(family), random_items(4)
    loss = next_token_loss(model, rows_of(items, answer_only=True))
    biases = {str(gate.layer): torch.zeros(gate.num_experts, requires_grad=True) for gate in find_gates(model)}
    with added_biases(model, biases):
        gradients = torch.autograd.grad(loss(list(range(4))), list(biases.values()))
    method = make_method("constant_bias", learning_rates=[0.02], epochs=1)
    method.fit(model, items)
    norm = torch.cat(gradients).norm().clamp(min=1.0)
    for bias, gradient in zip(method.state().values(), gradients):
        clipped = gradient / norm
        torch.testing.assert_close(bias, -0.02 * clipped / (clipped.abs() + 1e-8), atol=1e-4, rtol=1e-3)


def test_the_rate_is_the_one_that_is_best_on_held_out_references():
    model, items, rates = tiny_model("olmoe"), random_items(10), [0.3, 1e-9, 0.03]
    held_out = rows_of(items[::5], answer_only=True)
    found = {}
    for rate in rates:
        alone = make_method("constant_bias", learning_rates=[rate], epochs=2)
        alone.fit(model, [item for at, item in enumerate(items) if at % 5])
        with alone.apply(model):
            found[rate] = score(model, held_out).mean_nll
    method = make_method("constant_bias", learning_rates=rates, epochs=2)
    method.fit(model, items)
    assert len(set(found.values())) == 3 and method.chosen == {"rate": min(found, key=found.get)}
    alone = make_method("constant_bias", learning_rates=[method.chosen["rate"]], epochs=2)
    alone.fit(model, items)
    assert all(torch.equal(alone.state()[name], bias) for name, bias in method.state().items())


def test_too_few_references_are_refused():
    with pytest.raises(ValueError, match="4 references are too few for ConstantBias, which needs 5"):
        make_method("constant_bias").fit(tiny_model("olmoe"), random_items(4))
