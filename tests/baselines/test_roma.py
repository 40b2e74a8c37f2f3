"""Training gates alone, and RoMA's pull of a question's routing to that of its neighbours."""

import dataclasses

import pytest
import torch

from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.answers import choice_scores
from knnmoe_hf.baselines.neighborhoods import Embedded
from knnmoe_hf.baselines.roma import _Manifold
from knnmoe_hf.baselines.tuning import descend, next_token_loss, with_weights
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.tasks.items import rows_of
from tests.baselines.items import random_items
from tests.support.models import FAMILIES, tiny_model


def right_items(model, count: int = 6) -> list:
    """Questions that the model answers correctly."""
    items = random_items(count)
    return [dataclasses.replace(item, answer=int(choice_scores(model, item).argmax())) for item in items]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_goes_a_rate_against_the_gradient_of_the_gates(family):
    model, items = tiny_model(family).requires_grad_(False), random_items(4)
    weights = {f"{gate.name}.{name}": p for gate in find_gates(model) for name, p in gate.module.named_parameters()}
    before = {name: weight.clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_()
    gradients = torch.autograd.grad(
        next_token_loss(model, rows_of(items, True))(list(range(4))), list(weights.values())
    )
    model.requires_grad_(False)
    norm = torch.cat([one.flatten() for one in gradients]).norm().clamp(min=1.0)
    method = make_method("router_only", learning_rates=[0.02], epochs=1)
    method.fit(model, items)
    assert list(method.state()) == list(weights)
    for name, gradient in zip(weights, gradients):
        clipped = gradient / norm
        step = 0.02 * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(method.state()[name], before[name] - step, atol=1e-3, rtol=1e-3)
        assert torch.equal(weights[name], before[name])


def test_the_distance_is_the_weighted_sum_of_squares_to_the_neighbours():
    model = tiny_model("olmoe")
    manifold = _Manifold(model, random_items(3), find_gates(model)[:1], neighbors=2)
    manifold.right = [0, 2, 5]
    manifold.embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # of 0, 1, 2
    manifold.near = Embedded(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -9.0]]))  # of 0, 2, 5; their mean is (0, -3)
    manifold.targets = torch.tensor([[[0.5, 0.3, 0.1, 0.1]], [[0.7, 0.1, 0.2, 0.0]], [[0.0, 0.0, 0.0, 1.0]]])
    own = torch.tensor([[[0.7, 0.1, 0.1, 0.1]]])
    # question 1 is as near to 0 as to 2: half of 0.2^2 + 0.2^2, and half of 0.1^2 + 0.1^2
    assert manifold.distance([1], own).item() == pytest.approx(0.5 * 0.08 + 0.5 * 0.02, abs=1e-6)
    # a question that was answered correctly is not a neighbour of its own
    near = manifold.near.nearest(manifold.embeddings[0], 2, itself=0)
    expected = near.kernel @ torch.tensor([0.02, 0.49 + 0.01 + 0.01 + 0.81])[near.indices - 1]
    assert manifold.distance([0], own).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_lambda_draws_the_routing_of_questions_together_and_lambda_0_is_router_only(family):
    model = tiny_model(family)
    items = right_items(model)
    how = dict(learning_rates=[0.01], epochs=4, examples_per_step=3, layers=None)
    alone = make_method("router_only", **how)
    alone.fit(model, items, seed=3)
    distances = {}
    for lam in (0.0, 100.0):
        method = make_method("roma", lambdas=[lam], **how)
        method.fit(model, items, seed=3)
        if not lam:
            assert all(torch.equal(method.state()[name], one) for name, one in alone.state().items())
        with torch.no_grad(), method.apply(model):
            manifold = _Manifold(model, items, find_gates(model), 3)
            manifold.look_again()
            distances[lam] = sum(
                manifold.distance([place], manifold.targets[at : at + 1]).item()
                for at, place in enumerate(manifold.right)
            ) / len(manifold.right)
    assert distances[100.0] < 0.9 * distances[0.0]


def by_hand(model, items: list, layers: int, k: int):
    """
    RoMA's two terms as the paper has them, each text run by itself: a function of some items, and one that reads the
    routing of all again, to which they are drawn.
    """
    gates = find_gates(model)[-layers:]

    def routing(item) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean last hidden state, and the softmaxes of the last token's logits in these layers, one vector."""
        seen: list = []
        handles = [gate.module.register_forward_hook(lambda _, a, o: seen.append(o[0])) for gate in gates]
        hidden = model.model(torch.tensor([item.prompt.tokens])).last_hidden_state[0]
        for handle in handles:
            handle.remove()
        return hidden.mean(0), torch.cat([logits[-1].softmax(-1) for logits in seen])

    with torch.no_grad():
        embeddings = torch.stack([routing(item)[0] for item in items])
    unit = torch.nn.functional.normalize(embeddings - embeddings.mean(0), dim=-1)
    squares = (unit[:, None] - unit[None]).square().sum(-1).fill_diagonal_(torch.inf)
    near, ids = squares.topk(k, largest=False)
    weights = (-near / (2 * near.median(-1, keepdim=True).values)).softmax(-1)
    targets: dict = {}

    def read_again() -> None:
        with torch.no_grad():
            targets.update(enumerate(routing(item)[1] for item in items))

    def loss(places: list[int], lam: float) -> torch.Tensor:
        nll, count, pulls = 0.0, 0, 0.0
        for place in places:
            item = items[place]
            answer = item.choices[item.answer]
            logits = model(torch.tensor([item.prompt.tokens + answer])).logits[0, -len(answer) - 1 : -1]
            nll += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
            count += len(answer)
            own = routing(item)[1]
            for weight, other in zip(weights[place], ids[place].tolist()):
                pulls += weight * (own - targets[other]).square().sum()
        return nll / count + lam * pulls / len(places)

    return loss, read_again


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [1, 2])
def test_the_steps_go_against_the_gradient_of_both_terms_by_hand(family, layers):
    """Two steps in each of two epochs: all are answered correctly, and each is drawn to its two nearest."""
    model = tiny_model(family).requires_grad_(False)
    items = right_items(model)
    how = dict(learning_rates=[0.001], epochs=2, examples_per_step=3)
    method = make_method("roma", lambdas=[3.0], layers=layers, neighbors=2, **how)
    method.fit(model, items, seed=5)
    loss, read_again = by_hand(model, items, layers, k=2)
    gates = find_gates(model)[-layers:]
    weights = {f"{gate.name}.{name}": p for gate in gates for name, p in gate.module.named_parameters()}
    values = {name: weight.detach().clone() for name, weight in weights.items()}
    with with_weights(weights, values):
        trained = list(weights.values())
        descend(trained, len(items), lambda places: loss(places, 3.0), 0.001, 2, 3, 5, before_epoch=read_again)
    assert list(method.state()) == list(values)
    for name, value in values.items():
        moved = value - weights[name]
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(method.state()[name] - weights[name], moved, atol=5e-5, rtol=0)


def test_only_the_last_layers_are_trained_and_too_few_right_answers_are_refused():
    model = tiny_model("olmoe")
    items = right_items(model)
    method = make_method("roma", layers=1, learning_rates=[0.01], lambdas=[1.0], epochs=1)
    method.fit(model, items)
    assert [name.split(".")[2] for name in method.state()] == ["1"]
    assert len(make_method("roma").candidates()) == 6
    wrong = [dataclasses.replace(item, answer=1 - item.answer) for item in items]
    with pytest.raises(ValueError, match="RoMA needs two references that the model answers correctly and found 0"):
        method.fit(model, wrong)
