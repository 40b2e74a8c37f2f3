"""`watch_lookups`: who is called, and when."""

import pytest
import torch

from knnmoe_hf import attach_memory, set_memory
from knnmoe_hf.models.attach import watch_lookups
from tests.conftest import random_memory
from tests.models.test_attach import logits_of


def test_observers_are_called_only_inside_watch_lookups(model, tokens):
    with pytest.raises(ValueError, match="no memory is attached"), watch_lookups(model, print):
        pass
    attach_memory(model, random_memory(model, rows=30, num_neighbors=5))
    seen = []
    with watch_lookups(model, seen.append):
        watched = logits_of(model, tokens)
    assert torch.equal(logits_of(model, tokens), watched)
    assert [event.layer for event in seen] == [0, 1]
    for event in seen:
        assert event.neighbors.rows.shape == (36, 5) and event.neighbors.rows.max() < 30
        assert event.confidence.shape == (36,) and 0 < event.confidence.min() and event.confidence.max() < 1
        assert event.tokens.shape == tuple(tokens.shape) and event.own[0].shape == event.mixed[0].shape == (36, 8)
        assert not torch.equal(event.own[0], event.mixed[0])


def test_an_observer_goes_on_watching_after_a_switch(model, tokens):
    attach_memory(model, random_memory(model, seed=5), "first")
    attach_memory(model, random_memory(model), "second")
    seen = []
    with watch_lookups(model, seen.append):
        set_memory(model, "first")
        model(tokens)
    model(tokens)
    assert len(seen) == 2


def test_several_observers_watch_at_once(model, tokens):
    attach_memory(model, random_memory(model))
    outer, inner = [], []
    with watch_lookups(model, outer.append):
        with watch_lookups(model, inner.append):
            model(tokens)
        model(tokens)
    assert len(outer) == 4 and len(inner) == 2
