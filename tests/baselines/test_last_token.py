"""Routing single tokens by given weights, on each of the three rules."""

import pytest
import torch

from knnmoe_hf.baselines.base import overriding
from knnmoe_hf.baselines.last_token import PutWeights, ReadWeights, at_place, check_softmax, routed_by_weights
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.lookup.rules import softmax_topk, softmax_topk_renormalized, topk_softmax
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.gates import find_gates
from tests.baselines.items import logits_of, random_items, routes_of
from tests.support.models import FAMILIES, tiny_model

WEIGHTS = torch.tensor([[0.1, 0.4, 0.0, 0.5]])


@pytest.mark.parametrize(
    "rule, expected",
    [
        (softmax_topk, [0.5, 0.4]),  # OLMoE: as they are
        (softmax_topk_renormalized, [5 / 9, 4 / 9]),  # Qwen3-MoE: divided by their sum
        (topk_softmax, [5 / 9, 4 / 9]),  # GPT-OSS: a softmax over the two chosen
    ],
)
def test_the_largest_are_chosen_and_weighted_by_the_familys_convention(rule, expected):
    weights, ids = routed_by_weights(rule, WEIGHTS, 2)
    assert ids.tolist() == [[3, 1]]
    torch.testing.assert_close(weights, torch.tensor([expected]))


@pytest.mark.parametrize("rule", [softmax_topk, softmax_topk_renormalized, topk_softmax])
def test_it_is_what_the_rule_makes_of_logits(rule):
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    weights, ids = routed_by_weights(rule, logits.softmax(-1), 3)
    expected, expected_ids = rule(logits, 3)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("rule", [softmax_topk, softmax_topk_renormalized, topk_softmax])
def test_gradients_are_finite_at_a_weight_of_zero(rule):
    weights = torch.tensor([[0.7, 0.3, 0.0, 0.0]], requires_grad=True)
    put, _ = routed_by_weights(rule, weights, 3)
    (put * torch.arange(3)).sum().backward()
    assert bool(weights.grad.isfinite().all()) and bool(weights.grad.any())


def read(model, tokens) -> list[torch.Tensor]:
    """By layer, the softmax of the gate's logits at the last of these tokens, (E,)."""
    readers = {gate.layer: ReadWeights(torch.tensor([len(tokens) - 1])) for gate in find_gates(model)}
    with overriding(model, readers):
        logits_of(model, tokens)
    return [reader.found[0] for reader in readers.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompts_own_weights_change_nothing(family):
    model, prompt = tiny_model(family), random_items()[0].prompt.tokens
    put = {g.layer: PutWeights(g, own, len(prompt) - 1) for g, own in zip(find_gates(model), read(model, prompt))}
    before = logits_of(model, prompt + (5, 6))[0]
    with overriding(model, put):
        torch.testing.assert_close(logits_of(model, prompt + (5, 6))[0], before)


def uniform(model, place: int, and_later: bool = False) -> dict[int, PutWeights]:
    return {gate.layer: PutWeights(gate, torch.full([8], 1 / 8), place, and_later) for gate in find_gates(model)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad_left", [False, True])
def test_only_the_tokens_from_that_place_on_change_whatever_the_padding_is(family, pad_left):
    model, prompt = tiny_model(family), random_items()[0].prompt.tokens
    sequences = [prompt + (5, 6, 7), prompt, prompt + (8,)]
    before = [logits_of(model, tokens)[0] for tokens in sequences]
    with overriding(model, uniform(model, len(prompt) - 1)):
        alone = [logits_of(model, tokens)[0] for tokens in sequences]
        together = logits_of(model, *sequences, pad_left=pad_left)
    for own, changed, batched in zip(before, alone, together):
        torch.testing.assert_close(batched, changed, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own[: len(prompt) - 1], changed[: len(prompt) - 1], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(own[len(prompt) - 1 :], changed[len(prompt) - 1 :], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("and_later", [False, True])
def test_with_a_cache_the_place_is_found_and_later_steps_are_as_in_one_call(family, and_later):
    model, prompt = tiny_model(family), torch.tensor([random_items()[0].prompt.tokens])
    whole = torch.cat([prompt, torch.tensor([[5, 6, 7]])], dim=1)
    with torch.no_grad(), overriding(model, uniform(model, prompt.shape[1] - 1, and_later)):
        expected = model(input_ids=whole).logits
        for split in (prompt.shape[1], 3):  # the prompt at once, and in two parts
            cache, found = None, []
            for part in (whole[:, :split], whole[:, split : split + 1], whole[:, split + 1 :]):
                output = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache, found = output.past_key_values, [*found, output.logits]
            torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("and_later", [False, True])
def test_which_tokens_are_routed_otherwise(and_later):
    model, prompt = tiny_model("olmoe"), random_items()[0].prompt.tokens
    before = routes_of(model, prompt)[0]
    with overriding(model, uniform(model, 3, and_later)):
        after = routes_of(model, prompt)[0]
    changed = (after - before).abs().sum(-1).nonzero().flatten().tolist()
    assert changed == (list(range(3, len(prompt))) if and_later else [3])


def test_places_are_counted_exactly_in_long_sequences():
    real = torch.ones(2, 5000, dtype=torch.bool)
    real[0, 4500:] = real[1, :1000] = False
    tokens = Tokens(2, 5000, real=real.flatten())
    found = at_place(tokens, torch.tensor([4499, 3999]), torch.device("cpu"))
    assert found.nonzero().flatten().tolist() == [4499, 9999]


def test_routers_without_a_softmax_are_refused():
    with pytest.raises(UnsupportedModelError, match="sigmoid"):
        check_softmax(find_gates(tiny_model("deepseek_v3")))
