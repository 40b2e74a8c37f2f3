"""A compiled model consults the memory that is in force now, whatever was compiled before."""

import copy
import gc
import logging

import pytest
import torch
from transformers import CompileConfig

from knnmoe_hf import attach_memory, detach_memory, disable_memory, set_memory
from knnmoe_hf.attach import watch_lookups
from tests.conftest import random_memory, tiny_model


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would collect it, slowly
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small_model(family):
    return tiny_model(family, num_hidden_layers=1, layer_types=None)


def logits_of(model, tokens, mask=None):
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask).logits


def compiled_outside(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model.compile(backend="eager")
    return model


def compiled_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "family, compiled_as", [("olmoe", compiled_outside), ("qwen3_moe", compiled_layers), ("gpt_oss", compiled_inside)]
)
def test_a_memory_attached_after_a_compiled_forward_takes_effect_and_so_does_every_change(family, tokens, compiled_as):
    eager, model = small_model(family), small_model(family)
    law, medicine = random_memory(eager, seed=1), random_memory(eager, seed=2)
    compiled = compiled_as(model)
    base = logits_of(compiled, tokens)
    attach_memory(eager, law)
    changed = logits_of(eager, tokens)
    attach_memory(compiled, law)
    torch.testing.assert_close(logits_of(compiled, tokens), changed)
    with disable_memory(model):
        assert torch.equal(logits_of(compiled, tokens), base)
    torch.testing.assert_close(logits_of(compiled, tokens), changed)
    attach_memory(model, medicine, name="medicine")
    assert not torch.allclose(logits_of(compiled, tokens), changed)
    set_memory(model, "default")
    torch.testing.assert_close(logits_of(compiled, tokens), changed)
    detach_memory(model)
    assert torch.equal(logits_of(compiled, tokens), base)


def test_an_error_while_disabled_does_not_leave_the_memory_off(tokens):
    model = small_model("olmoe")
    attach_memory(model, random_memory(model))
    compiled = compiled_outside(model)
    changed = logits_of(compiled, tokens)
    with pytest.raises(KeyError), disable_memory(model):
        base = logits_of(compiled, tokens)
        raise KeyError
    assert not torch.equal(base, changed)
    assert torch.equal(logits_of(compiled, tokens), changed)


@pytest.mark.parametrize("family", ["olmoe"])
def test_a_compiled_forward_reads_the_mask_of_its_own_call(family, tokens):
    model = small_model(family)
    attach_memory(model, random_memory(model))
    compiled = compiled_outside(model)
    for padding in (0, 5, 2):
        mask = torch.ones_like(tokens)
        mask[:, :padding] = 0
        with torch.no_grad():
            wanted = model(input_ids=tokens, attention_mask=mask).logits
        torch.testing.assert_close(logits_of(compiled, tokens, mask)[:, padding:], wanted[:, padding:])


def test_lookups_of_a_compiled_model_can_be_watched(tokens):
    model = small_model("gpt_oss")
    attach_memory(model, random_memory(model))
    compiled, seen = compiled_outside(model), []
    unwatched = logits_of(compiled, tokens)
    with watch_lookups(compiled, lambda layer, neighbors, confidence: seen.append(layer)):
        assert torch.equal(logits_of(compiled, tokens), unwatched)
    assert seen == [0]
    logits_of(compiled, tokens)
    assert seen == [0]


@pytest.mark.parametrize(
    "family, space, width, backend",
    [
        ("olmoe", "logits", None, "torch"),
        ("qwen3_moe", "delta", 1, "hnsw"),
        ("gpt_oss", "assignment", None, "torch"),
    ],
)
def test_a_model_with_a_memory_compiles_into_one_graph(family, tokens, space, width, backend):
    model = small_model(family)
    model.set_experts_implementation("batched_mm")
    memory = random_memory(model, value_space=space, routing_width=width, search_backend=backend)
    attach_memory(model, memory)
    wanted = logits_of(model, tokens)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, tokens), wanted)


def test_a_copy_of_a_model_compiles_though_the_original_is_gone(tokens):
    model = small_model("olmoe")
    attach_memory(model, random_memory(model))
    wanted, twin = logits_of(model, tokens), copy.deepcopy(model)
    detach_memory(model)
    del model
    gc.collect()
    torch.testing.assert_close(logits_of(compiled_outside(twin), tokens), wanted)


@pytest.mark.parametrize("family", ["gpt_oss"])
def test_generation_that_compiles_its_static_cache_sees_each_change(family, tokens):
    model = small_model(family)
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True  # transformers' own switch for tests; else it compiles on accelerators only
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    same = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)

    def generate(**options):
        return model.generate(tokens, **same, **options)

    def compiled():
        return generate(cache_implementation="static", compile_config=config)

    base = generate()
    assert torch.equal(compiled(), base)
    attach_memory(model, random_memory(model))
    changed = generate()
    assert not torch.equal(changed, base)
    assert torch.equal(compiled(), changed)
    with disable_memory(model):
        assert torch.equal(compiled(), base)
    assert torch.equal(compiled(), changed)
    detach_memory(model)
    assert torch.equal(compiled(), base)
