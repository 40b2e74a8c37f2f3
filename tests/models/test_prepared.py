"""Prepared memories: options are fixed at attach, switching is cheap, and other overrides work beside them."""

import logging

import pytest
import torch

from knnmoe_hf import (
    active_memory,
    attach_memory,
    attach_override,
    detach_memory,
    disable_memory,
    get_memory,
    set_memory,
    watch_lookups,
)
from knnmoe_hf.models import attach, logits_probe
from knnmoe_hf.models.hooks import RoutingHooks
from knnmoe_hf.models.probe import probe_model
from tests.support.models import random_memory, tiny_model


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def nothing(x, output, tokens):
    return None


CHANGES = dict(
    num_neighbors=1,
    temperature=0.01,
    gamma=5.0,
    confidence="context",
    half_life=1.0,
    routing_width=1,
    value_space="delta",
    search_backend="hnsw",
    context_threshold=5.0,
    layers=[1],
)


@pytest.mark.parametrize("option", CHANGES)
def test_changing_the_config_of_an_attached_memory_has_no_effect_until_it_is_attached_again(option, tokens):
    model = tiny_model("olmoe")
    memory = random_memory(model)
    attach_memory(model, memory)
    before, alone = logits_of(model, tokens), logits_of(model, tokens[:1, :1])
    for config in (memory.config, get_memory(model).config):
        setattr(config, option, CHANGES[option])
    assert torch.equal(logits_of(model, tokens), before)
    assert torch.equal(logits_of(model, tokens[:1, :1]), alone)
    torch.testing.assert_close(logits_of(model, tokens)[0, 0], alone[0, 0], atol=1e-4, rtol=1e-4)
    if option in ("num_neighbors", "temperature", "gamma", "routing_width"):
        detach_memory(model)
        attach_memory(model, memory)
        changed = logits_of(model, tokens)
        assert not torch.equal(changed, before)
        one = logits_of(model, tokens[:1, :1])  # a token alone and the same token in a batch always agree
        torch.testing.assert_close(changed[0, 0], one[0, 0], atol=1e-4, rtol=1e-4)


def test_switching_neither_probes_nor_reads_weights_nor_resets_compilers(model, tokens, monkeypatch):
    done = []
    for module in (attach, logits_probe):  # of overrides, and of memories
        monkeypatch.setattr(module, "probe_model", lambda model: done.append("probe") or probe_model(model))
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("reset"))
    first, second = random_memory(model), random_memory(model, seed=5)
    attach_memory(model, first, "first")
    attach_memory(model, second, "second")
    assert done.count("probe") == 2 and done.count("reset") == 1  # when the first hook came
    logits_of(model, tokens)
    done.clear()
    for name in ("first", "second"):
        set_memory(model, name)
        with disable_memory(model):
            logits_of(model, tokens)
        logits_of(model, tokens)
    detach_memory(model, "second")
    attach_override(model, {0: nothing}, "nothing")
    detach_memory(model, "nothing")
    assert done == ["probe"]  # of the override
    detach_memory(model)
    assert done == ["probe", "reset"] and RoutingHooks.of(model) is None


def test_an_unrelated_compiled_function_stays_compiled_while_a_memory_is_attached(model, tokens):
    attach_memory(model, random_memory(model))
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    unrelated = torch.compile(lambda x: x * 2, backend=backend)
    unrelated(torch.ones(3))
    attach_memory(model, random_memory(model, seed=7), "other")
    set_memory(model, "default")
    with disable_memory(model):
        unrelated(torch.ones(3))
    detach_memory(model, "other")
    unrelated(torch.ones(3))
    assert len(compilations) == 1


def test_functions_for_memories_refuse_overrides_by_name(model, tokens):
    memory = random_memory(model)
    attach_override(model, {1: nothing}, "bias")
    assert active_memory(model) == "bias"
    for question in (lambda: get_memory(model), lambda: get_memory(model, "bias")):
        with pytest.raises(
            ValueError, match="'bias' is a routing override, not a memory: attach one with attach_memory"
        ):
            question()
    with pytest.raises(ValueError, match="'bias' is a routing override, not a memory"), watch_lookups(model, print):
        pass
    attach_memory(model, memory, "law")
    assert get_memory(model) is get_memory(model, "law") is memory
    set_memory(model, "bias")
    with pytest.raises(ValueError, match=r"choose among \['law'\]"):
        get_memory(model)
    with disable_memory(model):
        assert active_memory(model) is None
    with pytest.raises(ValueError, match="'law' is already attached"):
        attach_override(model, {0: nothing}, "law")
    detach_memory(model, "law")
    assert active_memory(model) == "bias"
    detach_memory(model)
    assert RoutingHooks.of(model) is None
    with pytest.raises(ValueError, match="no memory is attached"):
        set_memory(model, "bias")


def test_invalid_overrides_are_refused(model):
    for wrong in ({0: "softmax"}, [nothing], None, {0: None}):
        with pytest.raises(TypeError, match="are not routing overrides: give a dict"):
            attach_override(model, wrong)
    with pytest.raises(ValueError, match=r"layer 7 has no gate: choose among \[0, 1\]"):
        attach_override(model, {0: nothing, 7: nothing})
    with pytest.raises(TypeError, match="is not the name of a memory"):
        attach_override(model, {0: nothing}, 3)
    assert RoutingHooks.of(model) is None


def test_attaching_a_memory_without_rows_warns(model, tokens, caplog):
    base = logits_of(model, tokens)
    memory = random_memory(model)
    empty = memory.take(torch.zeros(len(memory), dtype=torch.bool))
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        attach_memory(model, empty)
    assert "has no rows" in caplog.text and torch.equal(logits_of(model, tokens), base)
