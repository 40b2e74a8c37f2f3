"""C3PO in its four forms: which tokens are routed otherwise, at what cost, by which references."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from knnmoe_hf import attach_memory
from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.answers import answered_correctly
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.models.hooks import RoutingHooks
from tests.baselines.c3po import FORMS, QUESTION, fitted, routed_to
from tests.baselines.items import logits_of, random_items, routes_of
from tests.support.models import FAMILIES, random_memory, tiny_model


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
