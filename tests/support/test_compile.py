"""torch.compile: one graph with each family and each cache, and every change of the memory takes effect.

The default run compiles each mechanism once; the other families and ways of compiling run with `make test-all`.
"""

import copy
import gc
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, DynamicCache, StaticCache

from knnmoe_hf import attach_memory, detach_memory, disable_memory, set_memory, use_memory
from knnmoe_hf.models.attach import watch_lookups
from tests.support.caches import additive, logits_of
from tests.support.models import random_memory, tiny_model
from tests.support.running_means import put_on
from tests.support.trees import PAD, attended, depths, each_alone, random_parents

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would collect it, slowly
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small_model(family):
    return tiny_model(family, num_hidden_layers=1, layer_types=None)


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
    "family, compiled_as",
    [
        ("olmoe", compiled_outside),
        pytest.param("qwen3_moe", compiled_layers, marks=slow),
        pytest.param("gpt_oss", compiled_inside, marks=slow),
    ],
)
def test_a_memory_attached_after_a_compiled_forward_takes_effect_and_so_does_every_change(family, tokens, compiled_as):
    eager, model = small_model(family), small_model(family)
    law, medicine = random_memory(eager, seed=1, recall="both"), random_memory(eager, seed=2)
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


@slow
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


def test_a_compiled_forward_reads_the_mask_of_its_own_call(tokens):
    model = small_model("olmoe")
    attach_memory(model, random_memory(model))
    compiled = compiled_outside(model)
    for padding in (0, 5, 2):
        mask = torch.ones_like(tokens)
        mask[:, :padding] = 0
        with torch.no_grad():
            wanted = model(input_ids=tokens, attention_mask=mask).logits
        torch.testing.assert_close(logits_of(compiled, tokens, mask)[:, padding:], wanted[:, padding:])


@slow
def test_lookups_of_a_compiled_model_can_be_watched(tokens):
    model = small_model("gpt_oss")
    attach_memory(model, random_memory(model))
    compiled, seen = compiled_outside(model), []
    unwatched = logits_of(compiled, tokens)
    with watch_lookups(compiled, lambda event: seen.append(event.layer)):
        assert torch.equal(logits_of(compiled, tokens), unwatched)
    assert seen == [0]
    logits_of(compiled, tokens)
    assert seen == [0]


@pytest.mark.parametrize(
    "family, space, width, backend, recall",
    [
        ("olmoe", "logits", None, "torch", "both"),
        ("qwen3_moe", "delta", 1, "hnsw", "routing"),
        ("gpt_oss", "assignment", None, "torch", "next_tokens"),
    ],
)
def test_a_model_with_a_memory_compiles_into_one_graph(family, tokens, space, width, backend, recall):
    model = small_model(family)
    model.set_experts_implementation("batched_mm")
    memory = random_memory(model, value_space=space, routing_width=width, search_backend=backend, recall=recall)
    attach_memory(model, memory)
    wanted = logits_of(model, tokens)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, tokens), wanted)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=tokens, logits_to_keep=1).logits, wanted[:, -1:])
        mask = tokens % 2 == 0  # of how many tokens logits are wanted, no graph knows
        torch.testing.assert_close(compiled(input_ids=tokens, logits_to_keep=mask).logits, wanted[mask])


def test_a_copy_of_a_model_compiles_though_the_original_is_gone(tokens):
    model = small_model("olmoe")
    attach_memory(model, random_memory(model))
    wanted, twin = logits_of(model, tokens), copy.deepcopy(model)
    detach_memory(model)
    del model
    gc.collect()
    torch.testing.assert_close(logits_of(compiled_outside(twin), tokens), wanted)


@slow
def test_generation_that_compiles_its_static_cache_sees_each_change(tokens):
    model = small_model("gpt_oss")
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


@pytest.mark.parametrize(
    "family, kind",
    [
        pytest.param("olmoe", None, marks=slow),
        ("qwen3_moe", DynamicCache),
        pytest.param("gpt_oss", StaticCache, marks=slow),
        pytest.param("olmoe", StaticCache, marks=slow),
    ],
)
def test_a_model_with_running_means_compiles_into_one_graph(family, tokens, kind):
    model = tiny_model(family, num_hidden_layers=1)
    model.set_experts_implementation("batched_mm")
    put_on(model)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    whole = logits_of(model, tokens, mask)
    if kind is None:
        torch.testing.assert_close(logits_of(compiled, tokens), logits_of(model, tokens))
        torch.testing.assert_close(logits_of(compiled, tokens, mask)[mask == 1], whole[mask == 1])
        return
    cache, start, found = kind(config=model.config, max_cache_len=12) if kind is StaticCache else kind(), 0, []
    for size in (6, 1, 1, 4):
        new = slice(start, start + size)
        start += size
        seen = torch.nn.functional.pad(mask[:, :start], (0, 12 - start if kind is StaticCache else 0))
        with torch.no_grad():
            out = compiled(tokens[:, new], seen, position_ids=positions[:, new], past_key_values=cache)
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1)[mask == 1], whole[mask == 1], atol=1e-4, rtol=1e-4)


@slow
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_trees_of_continuations_compile_into_one_graph(kind):
    model = tiny_model("olmoe", num_hidden_layers=1, attn_implementation="eager")
    model.set_experts_implementation("batched_mm")
    put_on(model)
    parents = random_parents(2, 16, seed=1)
    ids = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(1))
    wanted, mask, positions = each_alone(model, ids, parents), attended(parents), depths(parents)
    spare = 4 if kind is StaticCache else 0
    cache, found = kind(config=model.config, max_cache_len=20) if spare else kind(), []
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for new in (slice(0, 9), slice(9, 16)):
        columns = 20 if spare else new.stop
        given = additive(torch.nn.functional.pad(mask, (0, spare))[:, :, new, :columns])
        with torch.no_grad():
            out = compiled(ids[:, new], given, position_ids=positions[:, new], past_key_values=cache)
        found.append(out.logits)
    real = parents != PAD
    torch.testing.assert_close(torch.cat(found, 1)[real], wanted[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param(DynamicCache, marks=slow), StaticCache])
def test_steps_of_a_single_sequence_compile_into_one_graph(tokens, kind):
    """Outside of a compiler a single token is computed with numbers, which would break the graph."""
    model = tiny_model("olmoe", num_hidden_layers=1)
    model.set_experts_implementation("batched_mm")
    attach_memory(model, random_memory(model, confidence="context"))
    tokens, cache = tokens[:1], kind(config=model.config, **({"max_cache_len": 12} if kind is StaticCache else {}))
    whole = logits_of(model, tokens)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = []
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
        mask = torch.ones(1, 12 if kind is StaticCache else end, dtype=torch.long)
        with torch.no_grad():
            positions = torch.arange(start, end)[None]
            out = compiled(tokens[:, start:end], mask, position_ids=positions, past_key_values=cache)
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)


def test_rows_of_any_length_share_two_graphs(tokens):
    model = tiny_model("olmoe", num_hidden_layers=1)
    model.set_experts_implementation("batched_mm")
    put_on(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (5, 9, 17, 33, 60):
        ids = tokens.repeat(1, 5)[:, :length]
        with torch.no_grad():
            found = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(found, logits_of(model, ids), atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 2  # one for the first length, one for all


@slow
def test_layers_that_compile_one_by_one_keep_the_same_running_means(tokens):
    model = tiny_model("olmoe")
    put_on(model)
    wanted = logits_of(model, tokens)
    compiled_layers(model)
    torch.testing.assert_close(logits_of(model, tokens), wanted)
    cache = model(tokens[:, :6]).past_key_values
    found = model(tokens[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(found, wanted[:, 6:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param(DynamicCache, marks=slow), StaticCache])
def test_a_compiled_model_refuses_a_cache_that_was_filled_without_its_memory(kind, tokens):
    model = small_model("olmoe")
    put_on(model)
    compiled = torch.compile(model, backend="eager")
    cache = kind(config=model.config, **(dict(max_cache_len=12) if kind is StaticCache else {}))
    with disable_memory(model):
        compiled(tokens[:, :6], past_key_values=cache)
    with pytest.raises(ValueError, match="tokens were added to it without the memory in force"):
        compiled(tokens[:, 6:7], past_key_values=cache)


@slow
@pytest.mark.parametrize("options", [{}, dict(prefill_chunk_size=4)], ids=["", "chunked prefill"])
def test_generation_that_compiles_its_static_cache_carries_running_means_on(options, tokens):
    model = small_model("gpt_oss")
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    same = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True)
    put_on(model)
    for _ in range(2):
        wanted = model.generate(tokens, return_dict_in_generate=True, **same)
        found = model.generate(
            tokens,
            return_dict_in_generate=True,
            cache_implementation="static",
            compile_config=config,
            **same,
            **options,
        )
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), atol=1e-4, rtol=1e-4)
        with disable_memory(model):
            base = model.generate(tokens, cache_implementation="static", compile_config=config, **same)
            assert torch.equal(base, model.generate(tokens, **same))


def test_a_compiled_model_runs_with_what_is_in_force_for_its_caller(tokens):
    """In threads and asyncio tasks, with one graph for each memory however often they switch."""
    model, names = small_model("olmoe"), ("first", "second", "third", None)
    for seed, name in enumerate(names[:-1]):
        attach_memory(model, random_memory(model, seed=seed + 1), name)
    expected = {}
    for name in names:
        with use_memory(model, name):
            expected[name] = logits_of(model, tokens)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)

    def run(name):
        with use_memory(model, name):
            torch.testing.assert_close(logits_of(compiled, tokens), expected[name])

    for name in names:
        run(name)
    graphs = counter.frame_count
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, names * 3))
    set_memory(model, "second")
    torch.testing.assert_close(logits_of(compiled, tokens), expected["second"])
    with disable_memory(model):
        set_memory(model, "first")
        torch.testing.assert_close(logits_of(compiled, tokens), expected[None])
    with use_memory(model, "third"):
        seen = []
        with watch_lookups(model, lambda event: seen.append(event.layer)):
            logits_of(compiled, tokens)
        assert seen == [0] and counter.frame_count > graphs
    assert counter.frame_count - graphs <= 2  # those of the observer
