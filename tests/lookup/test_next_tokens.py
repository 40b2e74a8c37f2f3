"""Lookups that recall next tokens: what the last layer leaves of its neighbours, for which recall and options."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from knnmoe_hf import native
from knnmoe_hf.lookup.make import Router, make_confidences, make_lookups, make_voting
from knnmoe_hf.lookup.next_tokens import DEFAULT_NEIGHBORS, DEFAULT_TEMPERATURE, DEFAULT_WEIGHT
from knnmoe_hf.lookup.observers import watching
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.rules import softmax_topk
from knnmoe_hf.lookup.sequence import Tokens
from tests.support.models import random_memory, tiny_model
from tests.support.stats import with_stats

ROUTERS = {layer: Router(softmax_topk, 2) for layer in (0, 1)}


@pytest.fixture(scope="module")
def memory():
    return random_memory(tiny_model("olmoe"), recall="both", next_token_neighbors=7, context_threshold=0.1)


def lookups_of(memory, **options):
    options = replace(memory.config.retrieval_options(), **options)
    return make_lookups(memory.layers, ROUTERS, options, memory.next_tokens)


def routed(lookups, count=5):
    """What each layer routes random inputs by, and the call's tokens."""
    generator, tokens, found = torch.Generator().manual_seed(3), Tokens(1, count), []
    for lookup in lookups.values():
        x, logits = torch.randn(count, 32, generator=generator), torch.randn(count, 8, generator=generator)
        found.append(lookup.route(x, (logits, *lookup.rule(logits, 2)), tokens))
    return found, tokens


@pytest.mark.parametrize("confidence", ["rbf", "context"])
@pytest.mark.parametrize("count", [1, 5])
def test_the_last_layer_leaves_more_neighbours_than_route_and_routing_stays_what_it_is(memory, confidence, count):
    both, tokens = routed(lookups_of(memory, confidence=confidence), count)
    alone, without = routed(lookups_of(memory, confidence=confidence, recall="routing"), count)
    for one, other in zip(both, alone):
        assert all(torch.equal(*pair) for pair in zip(one, other))
    assert without.recalled is None
    distances, rows = tokens.recalled.voters
    assert rows.shape == (count, 7) and (distances.diff() >= 0).all()
    assert tokens.recalled.scale == memory.layers[1].scale
    assert isinstance(tokens.recalled.confidence, float) == (count == 1)


def test_fewer_neighbours_may_vote_than_route(memory):
    _, few = routed(lookups_of(memory, next_token_neighbors=2))
    _, many = routed(lookups_of(memory))
    assert torch.equal(few.recalled.voters.rows, many.recalled.voters.rows[:, :2])
    torch.testing.assert_close(few.recalled.confidence, many.recalled.confidence)
    assert routed(lookups_of(memory, next_token_neighbors=1000))[1].recalled.voters.rows.shape == (5, len(memory))


def test_pytorch_leaves_what_native_code_leaves(memory, monkeypatch):
    _, found = routed(lookups_of(memory))
    monkeypatch.setattr(native, "on", lambda device: None)
    _, wanted = routed(lookups_of(memory))
    assert torch.equal(found.recalled.voters.rows, wanted.recalled.voters.rows)
    torch.testing.assert_close(found.recalled.confidence, wanted.recalled.confidence)


def test_next_tokens_alone_route_nothing_and_look_up_only_what_the_confidence_needs(memory):
    idle = lookups_of(memory, recall="next_tokens")
    seen = []
    with watching(idle.values(), seen.append):
        assert routed(idle)[0] == [None, None]
    assert [event.layer for event in seen] == [0, 1] and [event.mixed for event in seen] == [None, None]
    assert seen[0].voters is None and seen[1].voters.rows.shape == (5, 7) and seen[1].neighbors.rows.shape == (5, 4)
    idle[0].engine = None  # it would raise
    found, tokens = routed(idle)
    assert found == [None, None] and tokens.recalled is not None
    in_context = lookups_of(memory, recall="next_tokens", confidence="context")
    found, tokens = routed(in_context)
    assert found == [None, None] and set(tokens.layer_evidence) == {0, 1}
    x, logits = torch.randn(5, 32), torch.randn(5, 8)
    tokens = Tokens(1, 5)
    assert idle[1].logits(x, logits, tokens) is logits and tokens.recalled is not None


def test_no_layer_moves_the_inputs_of_the_others_where_next_tokens_alone_are_recalled(memory):
    layers = with_stats(memory, open_shift=0.1, background_open_shift=0.1).layers
    for recall, shift in (("routing", 0.1), ("both", 0.1), ("next_tokens", 0.0)):
        options = replace(memory.config.retrieval_options(), recall=recall, confidence="calibrated")
        for one in make_confidences(layers, options).values():
            assert one.stats.open_shift == one.stats.background_open_shift == shift


@pytest.mark.parametrize("count", [1, 5])
def test_nothing_is_left_where_no_token_is_trusted(memory, count):
    assert routed(lookups_of(memory, gamma=1e9), count)[1].recalled is None


def test_options_decide_the_votes_and_defaults_where_they_name_none(memory):
    options = replace(memory.config.retrieval_options(), next_token_weight=0, next_token_temperature=2)
    (made,) = make_voting(memory.layers, options, memory.next_tokens).values()
    assert (made.weight, made.temperature, made.num_voters) == (0.0, 2.0, 7)
    (made,) = make_voting(memory.layers, RetrievalOptions(recall="both"), memory.next_tokens).values()
    assert (made.weight, made.temperature, made.num_voters) == (
        DEFAULT_WEIGHT,
        DEFAULT_TEMPERATURE,
        DEFAULT_NEIGHBORS,
    )
    assert make_voting(memory.layers, replace(options, recall="routing"), None) == {}
    with pytest.raises(ValueError, match="recall='both' needs the token that follows each row, and there is none"):
        make_voting(memory.layers, options, None)


def test_copies_and_pickles_vote_alike(memory):
    lookups = lookups_of(memory)
    _, wanted = routed(lookups)
    for twins in (copy.copy, lambda one: pickle.loads(pickle.dumps(one))):
        _, found = routed({layer: twins(lookup) for layer, lookup in lookups.items()})
        assert torch.equal(found.recalled.voters.rows, wanted.recalled.voters.rows)
        assert torch.equal(found.recalled.voting.next_tokens, memory.next_tokens)
