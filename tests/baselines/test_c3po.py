"""C3PO in its four forms: what is moved where, by how much, and at what cost."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from knnmoe_hf import attach_memory
from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.answers import answered_correctly
from knnmoe_hf.baselines.base import overriding
from knnmoe_hf.baselines.c3po import cosine_rates, on_simplex
from knnmoe_hf.baselines.last_token import PutWeights
from knnmoe_hf.baselines.neighborhoods import Embedded, answer_nll, read_prompts
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import RoutingHooks
from tests.baselines.items import logits_of, random_items, routes_of
from tests.support.models import FAMILIES, random_memory, tiny_model

FORMS = ("c3po_mode_finding", "c3po_kernel_regression", "c3po_gradient_descent", "c3po_released")
FOUR = {"olmoe": {"num_experts": 4}, "qwen3_moe": {"num_experts": 4}, "gpt_oss": {"num_local_experts": 4}}
QUESTION = random_items(seed=1)[0].prompt
NEAR, FAR = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.7, 0.04, 0.16, 0.1])


def fitted(name: str, model, **options):
    method = make_method(name, **options)
    method.fit(model, random_items(count=16))
    return method


def with_references(name: str, model, pathways: list[torch.Tensor], **options):
    """A method whose references have these routing weights in both layers."""
    method, items = make_method(name, **options), random_items(count=len(pathways))
    embeddings, _ = read_prompts(model, [item.prompt.tokens for item in items])
    stacked = torch.stack([torch.stack([weights, weights]) for weights in pathways])
    method.restore(model, items, {"embeddings": embeddings, "pathways": stacked, "kept": torch.arange(len(items))})
    return method


def undecided(family: str):
    """A model with four experts whose gates give each of them a weight of 1/4."""
    model = tiny_model(family, **FOUR[family])
    for gate in find_gates(model):
        for parameter in gate.module.parameters():
            parameter.data.zero_()
    return model


def routed_to(method, model) -> list[torch.Tensor]:
    """By layer, the expert weights of the question's last token (E,) with the method."""
    with method.apply(model, QUESTION):
        return [routes[-1] for routes in routes_of(model, QUESTION.tokens).values()]


def by_convention(family: str, chosen: dict[int, float]) -> torch.Tensor:
    """Expert weights (4,) of a token whose two largest routing weights are these."""
    total = 1 if family == "olmoe" else sum(chosen.values())
    return torch.tensor([chosen.get(expert, 0.0) / total for expert in range(4)])


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


@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_regression_equals_the_formula_by_hand(family):
    """One neighbour of weights v: of w, (w + v) / 2 and v, those that make its answer likeliest."""
    model = undecided(family)
    method = with_references("c3po_kernel_regression", model, [FAR], neighbors=1, shares=3, most_similar=2.0)
    item, gates = random_items(count=1)[0], find_gates(model)
    candidates = [torch.full([4], 0.25), torch.tensor([0.475, 0.145, 0.205, 0.175]), FAR]

    def nll(weights: torch.Tensor) -> float:
        put = {gate.layer: PutWeights(gate, weights, len(item.prompt.tokens) - 1) for gate in gates}
        with torch.no_grad(), overriding(model, put):
            return answer_nll(model, [(item.prompt.tokens, item.choices[item.answer])]).item()

    best = min(candidates, key=nll)
    with overriding(model, {g.layer: PutWeights(g, best, len(QUESTION.tokens) - 1) for g in gates}):
        expected = [routes[-1] for routes in routes_of(model, QUESTION.tokens).values()]
    for routes, wanted in zip(routed_to(method, model), expected):
        torch.testing.assert_close(routes, wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_a_step_of_gradient_descent_equals_that_by_hand(family, optimizer):
    """The gradient is that of the neighbour's NLL per answer token, by differences; two experts of four may move."""
    model = tiny_model(family, **FOUR[family])
    item, gates = random_items(count=2)[1], find_gates(model)
    _, start = (table[0] for table in read_prompts(model, [QUESTION.tokens], gates))
    options = dict(neighbors=1, steps=1, rate=0.01, experts=2, optimizer=optimizer, most_similar=2.0)
    method = make_method("c3po_gradient_descent", **options)
    embedding, own = read_prompts(model, [item.prompt.tokens], gates)
    method.restore(model, [item], {"embeddings": embedding, "pathways": own, "kept": torch.tensor([0])})

    def nll(weights: torch.Tensor) -> torch.Tensor:
        put = {g.layer: PutWeights(g, weights[i], len(item.prompt.tokens) - 1) for i, g in enumerate(gates)}
        with torch.no_grad(), overriding(model, put):
            return answer_nll(model, [(item.prompt.tokens, item.choices[item.answer])])[0] / 2

    assert len(item.choices[item.answer]) == 2
    expected = start.clone()
    for layer, expert in ((i, e) for i in range(2) for e in start[i].topk(2).indices.tolist()):
        step = torch.zeros_like(start)
        step[layer, expert] = 2e-3
        slope = (nll(start + step) - nll(start - step)) / 4e-3
        expected[layer, expert] -= 0.01 * (slope if optimizer == "gd" else slope.sign())
    for layer, first_two in enumerate(start.topk(2).indices):
        expected[layer, first_two] *= start[layer, first_two].sum() / expected[layer, first_two].sum()
    put = {g.layer: PutWeights(g, expected[i], len(QUESTION.tokens) - 1) for i, g in enumerate(gates)}
    with overriding(model, put):
        wanted = [routes[-1] for routes in routes_of(model, QUESTION.tokens).values()]
    assert not torch.allclose(expected, start, atol=1e-4)
    for routes, goal in zip(routed_to(method, model), wanted):
        torch.testing.assert_close(routes, goal, atol=1e-4, rtol=0)


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


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_changes_the_last_prompt_token_and_leaves_the_model_as_it_was(name, family):
    model = tiny_model(family)
    method, answer = fitted(name, model), QUESTION.tokens + (5, 6)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    before, routes = logits_of(model, answer)[0], routes_of(model, answer)
    with torch.no_grad(), method.apply(model, QUESTION):
        adapted = {layer: table - routes[layer] for layer, table in routes_of(model, answer).items()}
    place = len(QUESTION.tokens) - 1
    places = [place, place + 1, place + 2] if name == "c3po_released" else [place]
    assert adapted[0].abs().sum(-1).nonzero().flatten().tolist() == places
    assert bool(adapted[1][place].any())
    with pytest.raises(KeyError), method.apply(model, QUESTION):
        raise KeyError
    assert torch.equal(logits_of(model, answer)[0], before) and RoutingHooks.of(model) is None
    assert trained == {name for name, one in model.named_parameters() if one.requires_grad}
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_of_one_prompt_in_a_batch_are_as_alone(name, family):
    model = tiny_model(family)
    method, sequences = fitted(name, model), [QUESTION.tokens + more for more in ((), (5,), (6, 7, 8))]
    with method.apply(model, QUESTION):
        together = logits_of(model, *sequences)
        for tokens, batched in zip(sequences, together):
            torch.testing.assert_close(batched, logits_of(model, tokens)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["c3po_mode_finding", "c3po_released"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generating_with_a_cache_gives_what_whole_texts_give(name, family):
    model, text = tiny_model(family), list(QUESTION.tokens)
    with fitted(name, model).apply(model, QUESTION):
        found = model.generate(torch.tensor([text]), max_new_tokens=5, do_sample=False)[0].tolist()
        for _ in range(5):
            text.append(int(logits_of(model, text)[0][-1].argmax()))
    assert found == text


@pytest.mark.parametrize("name", FORMS)
def test_its_cost_is_that_of_its_passes(name):
    """Every example that runs through the decoder and, for a backward pass, every one whose logits get a gradient."""
    model = tiny_model("olmoe")
    method = fitted(name, model)
    forward, backward = [], []
    with method.apply(model, QUESTION):
        pass
    hooks = [
        model.model.register_forward_pre_hook(
            lambda _, args, kwargs: forward.append(len(kwargs["input_ids"])), with_kwargs=True
        ),
        model.lm_head.register_full_backward_pre_hook(lambda _, gradients: backward.append(len(gradients[0]))),
    ]
    with method.apply(model, QUESTION):
        pass
    for hook in hooks:
        hook.remove()
    assert (sum(forward), sum(backward)) == (method.cost.forward, method.cost.backward)
    expected = {"c3po_kernel_regression": (34, 0), "c3po_gradient_descent": (31, 30)}
    assert (sum(forward), sum(backward)) == expected.get(name, (1, 0))


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_share_one_fit(name, tmp_path):
    model = tiny_model("olmoe")
    saved, other = fitted("c3po_released", model), make_method(name)
    assert saved.fit_key == other.fit_key != make_method(name, layers=1).fit_key
    saved.save(tmp_path / "fit")
    other.load(model, random_items(count=16), tmp_path / "fit")
    own = fitted(name, model)
    for loaded, routes in zip(routed_to(other, model), routed_to(own, model)):
        assert torch.equal(loaded, routes)
    tokens = 4 * sum(len(item.tokens) for item in own._references)
    tables = len(own._references) * (32 + 2 * 8) * 4 + len(own._references) * 8
    assert own.nbytes == other.nbytes == tables + (tokens if "find" not in name and "rel" not in name else 0)


def test_only_references_that_are_answered_correctly_count():
    model, items = tiny_model("olmoe"), random_items(count=16)
    correct = answered_correctly(model, items)
    assert 0 < sum(correct) < 16
    assert fitted("c3po_released", model).state()["kept"].tolist() == [i for i, right in enumerate(correct) if right]
    wrong = [item for item, right in zip(items, correct) if not right]
    with pytest.raises(ValueError, match="needs 3 references .* and there are 0"):
        make_method("c3po_released").fit(model, wrong)


def test_only_the_last_layers_change():
    model = tiny_model("olmoe", num_hidden_layers=3)
    method = fitted("c3po_mode_finding", model, layers=2)
    before = routes_of(model, QUESTION.tokens)
    with method.apply(model, QUESTION):
        after = routes_of(model, QUESTION.tokens)
    assert [not torch.equal(before[layer], after[layer]) for layer in range(3)] == [False, True, True]


def test_a_question_without_neighbours_is_answered_by_the_frozen_model():
    model = tiny_model("olmoe")
    for name in FORMS:
        method = fitted(name, model)
        method._embedded.limit = -2.0  # below every cosine
        before = logits_of(model, QUESTION.tokens)[0]
        with method.apply(model, QUESTION):
            assert torch.equal(logits_of(model, QUESTION.tokens)[0], before)


def test_a_missing_prompt_a_missing_fit_and_bad_options_are_refused():
    with pytest.raises(ValueError, match="optimizer='sgd'"):
        make_method("c3po_gradient_descent", optimizer="sgd")
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match="pass the prompt"), fitted("c3po_released", model).apply(model):
        pass
    with pytest.raises(ValueError, match="Released has not been fitted"):
        with make_method("c3po_released").apply(model, QUESTION):
            pass
    with pytest.raises(UnsupportedModelError, match="sigmoid"):
        fitted("c3po_released", tiny_model("deepseek_v3"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_it_works_in_bfloat16_and_beside_an_adapter_of_peft(name):
    model = get_peft_model(tiny_model("gpt_oss").to(torch.bfloat16), LoraConfig(target_modules=["q_proj"]))
    method, before = fitted(name, model), logits_of(model, QUESTION.tokens)[0]
    with method.apply(model, QUESTION):
        assert not torch.equal(logits_of(model, QUESTION.tokens)[0], before)
    assert torch.equal(logits_of(model, QUESTION.tokens)[0], before)


def test_a_memory_that_is_attached_has_no_part_in_it():
    model = tiny_model("olmoe")
    expected = routed_to(fitted("c3po_gradient_descent", model), model)
    attach_memory(model, random_memory(model))
    before = logits_of(model, QUESTION.tokens)[0]
    method = fitted("c3po_gradient_descent", model)
    for routes, wanted in zip(routed_to(method, model), expected):
        assert torch.equal(routes, wanted)
    assert torch.equal(logits_of(model, QUESTION.tokens)[0], before)
