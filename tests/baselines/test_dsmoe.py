"""DSMoE's importance of tokens, score of experts and bonus."""

import math

import pytest
import torch

from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.dsmoe import is_filler, scores_of
from knnmoe_hf.models.gates import find_gates
from tests.baselines.c3po import QUESTION, by_convention, undecided
from tests.baselines.items import random_items, routes_of
from tests.support.models import FAMILIES, tiny_model
from tests.support.tokenizers import byte_tokenizer


def test_the_score_is_the_surplus_of_important_tokens_times_the_share_of_all_choices():
    chosen = {
        0: torch.tensor([[1.0, 1.0, 0.0, 2.0], [3.0, 1.0, 0.0, 0.0]]),
        3: torch.tensor([[0.0] * 4, [0, 0, 2, 6]]),
    }
    found = scores_of(chosen)  # of 16 choices
    assert found[0].tolist() == [(3 - 1) * 4 / 16, 0.0, 0.0, (0 - 2) * 2 / 16]
    assert found[3].tolist() == [0.0, 0.0, 2 * 2 / 16, 6 * 6 / 16]


@pytest.mark.parametrize(("mode", "bonus"), [("multiplicative", math.log(1.25)), ("additive", 0.25)])
def test_the_best_experts_of_all_layers_get_the_bonus(mode, bonus):
    method = make_method("dsmoe", num_experts=2, strength=0.25, mode=mode)
    found = method._bonus({0: torch.tensor([0.5, 0.0, -1.0]), 3: torch.tensor([0.2, 0.6, 0.1])})
    torch.testing.assert_close(found, {"0": torch.tensor([bonus, 0, 0]), "3": torch.tensor([0, bonus, 0])})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fit_counts_what_was_chosen_for_important_and_other_tokens(family):
    model, items, words = tiny_model(family, vocab_size=300), random_items(3), {"7", "a"}
    method = make_method("dsmoe", num_experts=4, percentile=60.0, stop_words="7 a")
    tokenizer = byte_tokenizer()
    method.fit(model, items, tokenizer=tokenizer)
    counts = {gate.layer: [[0, 0] for _ in range(gate.num_experts)] for gate in find_gates(model)}
    for item in items:
        ids, chosen = torch.tensor([item.tokens]), {}
        handles = [
            gate.module.register_forward_hook(
                lambda _, a, o, into=chosen, at=gate.layer: into.update({at: o[2].tolist()})
            )
            for gate in find_gates(model)
        ]
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()
        for handle in handles:
            handle.remove()
        importance = (embeddings.grad * embeddings).detach().norm(dim=-1)[0]
        border = importance.quantile(0.6)
        for at, token in enumerate(item.tokens):
            important = importance[at] > border and not is_filler(tokenizer.decode([token]), words)
            for layer, experts in chosen.items():
                for expert in experts[at]:
                    counts[layer][expert][int(important)] += 1
    tables = {layer: torch.tensor(table, dtype=torch.float32).T for layer, table in counts.items()}
    expected = method._bonus(scores_of(tables))
    torch.testing.assert_close(dict(method.state()), expected)
    assert sum(int((bonus > 0).sum()) for bonus in method.state().values()) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bonus_is_added_to_the_logits_and_the_family_routes_the_sum(family):
    """Of gates that give every expert 0, logits (0, log 1.5, 0, log 1.5): experts 1 and 3, each of weight 1.5 / 5."""
    model, bonus = undecided(family), torch.tensor([0, math.log(1.5), 0, math.log(1.5)])
    method = make_method("dsmoe")
    method.restore(model, (), {"0": bonus, "1": torch.zeros(4)})
    with method.apply(model):
        routes = routes_of(model, QUESTION.tokens)[0]
    expected = by_convention(family, {1: 0.3, 3: 0.3})
    torch.testing.assert_close(routes, expected.expand_as(routes))


def test_stop_words_and_punctuation_are_fillers():
    words = {"the", "of"}
    assert is_filler(" The", words) and is_filler("of", words) and is_filler(" ...", words) and is_filler(")", words)
    assert not (is_filler("theory", words) or is_filler(" ", words) or is_filler("a.", words))


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="mode='x' is not allowed: choose one of multiplicative, additive."):
        make_method("dsmoe", mode="x")
