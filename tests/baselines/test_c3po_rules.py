"""The update rules of C3PO's four forms, worked out by hand on a few experts."""

import math

import pytest
import torch
from torch.nn import functional as F

from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.base import overriding
from knnmoe_hf.baselines.c3po import cosine_rates, on_simplex
from knnmoe_hf.baselines.last_token import PutWeights
from knnmoe_hf.baselines.neighborhoods import Embedded, answer_nll, read_prompts
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import RoutingHooks
from tests.baselines.c3po import FOUR, QUESTION, by_convention, fitted, routed_to, undecided, with_references
from tests.baselines.items import logits_of, random_items, routes_of
from tests.support.models import FAMILIES, tiny_model

NEAR, FAR = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.7, 0.04, 0.16, 0.1])


@pytest.mark.parametrize("family", FAMILIES)
def test_mode_finding_equals_the_formula_by_hand(family):
    model = undecided(family)
    # squared distances to 1/4 everywhere, in two layers: 2 * 0.05 and 2 * 0.2772; sigma^2 is 0.1, the lower median
    kernel = [math.exp(-0.1 / 0.2), math.exp(-0.5544 / 0.2)]
    mean = (kernel[0] * NEAR + kernel[1] * FAR) / sum(kernel)
    moved = (0.5 * 0.25 + 0.5 * mean).tolist()
    expected = by_convention(family, {0: moved[0], 1: moved[1]})
    even_farther = torch.tensor([0.0, 0.0, 0.0, 1.0])
    method = with_references("c3po_mode_finding", model, [FAR, even_farther, NEAR], neighbors=2, most_similar=2.0)
    for routes in routed_to(method, model):
        torch.testing.assert_close(routes, expected)


def kernel_by_hand(model, items: list, k: int) -> dict[int, float]:
    """The k nearest of these questions, nearest first, and their Gaussian weights."""
    hidden = []
    for tokens in [*(item.prompt.tokens for item in items), QUESTION.tokens]:
        with torch.no_grad():
            hidden.append(model.model(torch.tensor([tokens])).last_hidden_state[0].mean(0))
    center = sum(hidden[:-1]) / len(items)
    *known, asked = ((one - center) / (one - center).norm() for one in hidden)
    squares = {number: (one - asked).square().sum().item() for number, one in enumerate(known)}
    near = sorted(squares, key=squares.get)[:k]
    variance = squares[near[(k - 1) // 2]]  # the lower median
    kernel = {number: math.exp(-squares[number] / (2 * variance)) for number in near}
    return {number: weight / sum(kernel.values()) for number, weight in kernel.items()}


def surrogate_by_hand(model, items: list, kernel: dict[int, float], weights: torch.Tensor) -> float:
    """The mean of the neighbours' NLL per answer token, with these weights (L, 4) at the last token of each prompt."""
    loss = 0.0
    for number, share in kernel.items():
        prompt, answer = items[number].prompt.tokens, items[number].choices[items[number].answer]
        put = {g.layer: PutWeights(g, weights[i], len(prompt) - 1) for i, g in enumerate(find_gates(model))}
        with overriding(model, put):
            logits = logits_of(model, prompt + answer)[0][len(prompt) - 1 : -1]
        loss += share * F.cross_entropy(logits.double(), torch.tensor(answer)).item()
    return loss


def check_routed_to(method, model, weights: torch.Tensor, **tolerance) -> None:
    """The question's last token is routed by these weights (L, 4)."""
    place, gates = len(QUESTION.tokens) - 1, find_gates(model)
    with overriding(model, {g.layer: PutWeights(g, weights[i], place) for i, g in enumerate(gates)}):
        wanted = [routes[-1] for routes in routes_of(model, QUESTION.tokens).values()]
    for routes, goal in zip(routed_to(method, model), wanted):
        torch.testing.assert_close(routes, goal, **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("neighbors", [1, 3])
def test_kernel_regression_equals_the_formula_by_hand(family, neighbors):
    """Of w, (w + v) / 2 and v, with v the mean of the neighbours, those that make their answers likeliest."""
    model, items = undecided(family), random_items(count=4)
    kernel = kernel_by_hand(model, items, neighbors)
    # the weights v that are best for the neighbours, by a look at many, so that the share of w is none
    tried = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)).mul(4).softmax(-1)
    best = min(tried, key=lambda one: surrogate_by_hand(model, items, kernel, one.expand(2, 4)))
    turned = {number: best.roll(0 if at == 0 else 4 - at) for at, number in enumerate(kernel)}
    pathways = [turned.get(number, NEAR) for number in range(4)]
    mean = sum(share * pathways[number] for number, share in kernel.items())
    candidates = [a * torch.full([4], 0.25) + (1 - a) * mean for a in (1.0, 0.5, 0.0)]
    chosen = min(candidates, key=lambda one: surrogate_by_hand(model, items, kernel, one.expand(2, 4)))
    method = with_references(
        "c3po_kernel_regression", model, pathways, neighbors=neighbors, shares=3, most_similar=2.0
    )
    check_routed_to(method, model, chosen.expand(2, 4))
    if neighbors == 1:
        assert not torch.equal(chosen, candidates[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("optimizer", "rates"), [("gd", [0.03, 0.01]), ("adam", [0.03, 0.01]), ("adam", [0.02])])
def test_steps_of_gradient_descent_equal_those_by_hand(family, optimizer, rates):
    """Two neighbours of three; gradients by differences; two experts of four may move, and keep their sum."""
    model, items = tiny_model(family, **FOUR[family]), random_items(count=3)
    gates = find_gates(model)
    _, start = (table[0] for table in read_prompts(model, [QUESTION.tokens], gates))
    options = dict(steps=len(rates), rate=rates[0], last_rate=rates[-1], experts=2, optimizer=optimizer)
    method = make_method("c3po_gradient_descent", neighbors=2, most_similar=2.0, **options)
    embeddings, own = read_prompts(model, [item.prompt.tokens for item in items], gates)
    method.restore(model, items, {"embeddings": embeddings, "pathways": own, "kept": torch.arange(3)})
    kernel = kernel_by_hand(model, items, 2)
    weights, movable = start.clone(), start.topk(2).indices
    means, squares = torch.zeros_like(start), torch.zeros_like(start)
    for step, rate in enumerate(rates, 1):
        slopes = torch.zeros_like(start)
        for layer, expert in ((i, e) for i in range(2) for e in movable[i].tolist()):
            change = torch.zeros_like(start)
            change[layer, expert] = 2e-3
            above, below = (surrogate_by_hand(model, items, kernel, weights + sign * change) for sign in (1, -1))
            slopes[layer, expert] = (above - below) / 4e-3
        means, squares = 0.9 * means + 0.1 * slopes, 0.999 * squares + 0.001 * slopes**2
        adam = (means / (1 - 0.9**step)) / ((squares / (1 - 0.999**step)).sqrt() + 1e-8)
        weights = weights - rate * (slopes if optimizer == "gd" else adam)
        for layer, moved in enumerate(movable):
            weights[layer, moved] = weights[layer, moved].clamp(min=0)
            weights[layer, moved] *= start[layer, moved].sum() / weights[layer, moved].sum()
    assert not torch.allclose(weights, start, atol=1e-3)
    check_routed_to(method, model, weights, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_released_code_averages_by_similarity(family):
    model = undecided(family)
    pathways = list(torch.rand(8, 4, generator=torch.Generator().manual_seed(3)).mul(3).softmax(-1))
    method = with_references("c3po_released", model, pathways, neighbors=2, most_similar=2.0)
    items = random_items(count=8)
    embeddings, _ = read_prompts(model, [item.prompt.tokens for item in items] + [QUESTION.tokens])
    similar = Embedded(embeddings[:8]).similarities(embeddings[8])
    first, second = similar.topk(2).indices.tolist()
    weights = similar[[first, second]] / similar[[first, second]].sum()
    mean = (weights[0] * pathways[first] + weights[1] * pathways[second]).tolist()
    assert min(similar[first], similar[second]) > 0 and weights[0] - weights[1] > 0.01
    top = sorted(range(4), key=mean.__getitem__)[-2:]
    for routes in routed_to(method, model):
        torch.testing.assert_close(routes, by_convention(family, {expert: mean[expert] for expert in top}))


def test_moved_weights_stay_on_the_simplex_by_hand():
    start = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    movable = torch.tensor([[True, True, True, False]])
    moved = torch.tensor([[0.6, -0.1, 0.3, 0.9]])  # 0.6, 0 and 0.3 have the sum 0.9 and are scaled to 0.9
    torch.testing.assert_close(on_simplex(moved, start, movable), torch.tensor([[0.6, 0.0, 0.3, 0.1]]))
    doubled = torch.tensor([[1.2, -0.1, 0.6, 0.9]])
    torch.testing.assert_close(on_simplex(doubled, start, movable), torch.tensor([[0.6, 0.0, 0.3, 0.1]]))
    assert torch.equal(on_simplex(-start, start, movable), start)


def test_the_learning_rate_falls_as_a_cosine():
    assert cosine_rates(1e-2, 1e-5, 10)[0] == 1e-2 and cosine_rates(1e-2, 1e-5, 10)[-1] == pytest.approx(1e-5)
    assert cosine_rates(3.0, 1.0, 3) == pytest.approx([3, 2, 1]) and cosine_rates(3.0, 1.0, 1) == [3.0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_the_surrogate_loss_falls(family, optimizer):
    model = tiny_model(family)
    method = fitted("c3po_gradient_descent", model, optimizer=optimizer, rate=0.05)
    near = method._embedded.nearest(read_prompts(model, [QUESTION.tokens])[0][0], 3)
    answers = [method._references[i] for i in near.indices.tolist()]

    def loss() -> float:
        """Of the neighbours, with what is in force imposed on the question's last token and so on theirs."""
        with torch.no_grad():
            nll = answer_nll(model, [(item.prompt.tokens, item.choices[item.answer]) for item in answers])
        return (near.kernel * nll / torch.tensor([len(item.choices[item.answer]) for item in answers])).sum().item()

    gates = find_gates(model)
    _, start = read_prompts(model, [QUESTION.tokens], gates)
    places = torch.tensor([len(item.prompt.tokens) - 1 for item in answers])
    with overriding(model, {g.layer: PutWeights(g, start[0, i], places) for i, g in enumerate(gates)}):
        before = loss()
    with method.apply(model, QUESTION):
        put = RoutingHooks.of(model).current
        weights = [put[gate.layer].weights for gate in gates]
    with overriding(model, {g.layer: PutWeights(g, w, places) for g, w in zip(gates, weights)}):
        assert loss() < before
