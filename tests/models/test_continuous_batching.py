"""Continuous batching: running sums beside its paged cache, and whose memory is in force in it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from knnmoe_hf import attach_memory, disable_memory, use_memory, watch_lookups
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.calls import CallTokens, Overrides, keep_state
from knnmoe_hf.models.continuous_batching import PagedSums
from knnmoe_hf.models.hooks import RoutingHooks
from tests.models.callers import CHANGES, NAMES, alone, generated, in_context, in_thread
from tests.support.attaching import hooks_of
from tests.support.caches import LENGTHS, uncached
from tests.support.models import random_memory, tiny_model
from tests.support.running_means import HALF_LIFE, contextual_model

ENGINES = {
    "plain": {},
    "prefill in parts": dict(max_batch_tokens=8, page_size=4),
    "nothing shared": dict(allow_block_sharing=False, page_size=4),
    "one at a time": dict(max_requests_per_batch=1, page_size=4),
}


def continuous(model, prompts, children=1, new=8, **options):
    """Generated tokens and log probabilities of each answer, `{request id: ...}`."""
    options = dict(page_size=16, max_batch_tokens=64, num_blocks=64) | options  # without bounds it takes all RAM
    config = ContinuousBatchingConfig(use_cuda_graph=False, return_logprobs=True, **options)
    generation = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=-1)
    generation.num_return_sequences = children
    return model.generate_batch(
        [p.tolist() for p in prompts], generation_config=generation, continuous_batching_config=config
    )


def assert_answers_as_uncached(model, found, expected):
    assert len(found) == expected
    for answer in found.values():
        assert answer.error is None
        prompt, new = answer.prompt_ids, answer.generated_tokens
        whole = uncached(model, torch.tensor([prompt + new]))[0].log_softmax(-1)
        at = torch.arange(len(new)) + len(prompt) - 1
        assert new == whole[at].argmax(-1).tolist()
        chances = whole[at, torch.tensor(new)]
        torch.testing.assert_close(torch.tensor(answer.logprobs), chances, atol=2e-4, rtol=1e-4)


def prompts_of(tokens):
    """Prompts of different lengths; two share a long prefix, which the cache stores once."""
    prompts = [tokens[row, :length] for row, length in enumerate(LENGTHS)]
    return prompts + [torch.cat([tokens[0], tokens[1, :5]]), torch.cat([tokens[0], tokens[1, :5]])]


@pytest.mark.parametrize(
    "family, engine",
    [
        ("olmoe", "plain"),
        ("olmoe", "prefill in parts"),
        ("gpt_oss", "nothing shared"),
        ("qwen3_moe", "one at a time"),
        *(
            pytest.param(family, engine, marks=pytest.mark.slow)
            for family, engine in [
                *(("gpt_oss", engine) for engine in ("plain", "prefill in parts", "one at a time")),
                *(("qwen3_moe", engine) for engine in ("plain", "prefill in parts", "nothing shared")),
                *(("olmoe", engine) for engine in ("nothing shared", "one at a time")),
            ]
        ),
    ],
)
def test_answers_equal_those_without_a_cache(family, engine, tokens):
    prompts = prompts_of(tokens)
    model = contextual_model(family)
    assert_answers_as_uncached(model, continuous(model, prompts, **ENGINES[engine]), len(prompts))


def test_several_answers_to_a_prompt_continue_the_same_sums(tokens):
    model = contextual_model("olmoe")
    prompts = [tokens[row, :length] for row, length in enumerate(LENGTHS)]
    found = continuous(model, prompts, children=3, page_size=4)
    assert_answers_as_uncached(model, found, 9)


def test_without_running_means_answers_equal_those_without_a_cache(tokens):
    model = tiny_model("gpt_oss")
    attach_memory(model, random_memory(model))
    assert_answers_as_uncached(model, continuous(model, prompts_of(tokens)[:3], new=4), 3)


# single calls, without transformers' engine


def pool_of(blocks):
    """What `PagedSums` reads of a cache's allocator, with so many blocks for each request."""
    pool = SimpleNamespace(
        index=0, layer_type="full_attention", tokens_per_page=4, block_physical_stride=24, num_blocks=8,
        blocks_per_sector=1, blocks=blocks, copy_blocks=lambda source, target: None,
    )  # fmt: skip
    pool.cache = SimpleNamespace(cache_allocators={"full_attention": pool})
    return pool


def handmade_batch(pool, past, new, form):
    """Arguments of a decoder in a continuous batch of requests with so many tokens before, and new ones."""
    reads = [[block * pool.block_physical_stride + i for block in blocks for i in range(4)] for blocks in pool.blocks]
    writes = [read[before : before + now] for read, before, now in zip(reads, past, new)]
    reads = [read[: before + now] for read, before, now in zip(reads, past, new)]
    lengths = torch.tensor([0, *new]), torch.tensor([0, *map(len, reads)])
    table = torch.tensor(pool.blocks) * (pool.block_physical_stride // 4)
    ids = torch.zeros(1, sum(new), dtype=torch.long)
    return dict(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(before, before + now) for before, now in zip(past, new)])[None],
        cu_seq_lens_q=lengths[0].cumsum(0).int(),
        cu_seq_lens_k={"full_attention": lengths[1].cumsum(0).int()},
        read_index=[torch.tensor(sum(reads, []) if any(past) and form == "index" else [], dtype=torch.long)],
        write_index=[torch.tensor(sum(writes, []) if form == "index" else [], dtype=torch.long)],
        block_table=table[None].int() if form == "blocks" else None,
        cache=pool.cache,
    )


@pytest.mark.parametrize("form", ["index", "blocks"])
def test_a_block_table_names_the_same_slots_as_indices(form):
    pool = pool_of([[2, 7, 3], [9, 4, 6]])
    values, overrides = torch.randn(2, 12), Overrides({})
    wanted = Tokens(2, 12).running_mean(0, values.flatten(), HALF_LIFE).view(2, 12)
    past = [0, 0]
    for step, new in enumerate([[7, 3], [1, 1], [1, 1], [1, 1], [1, 1]]):
        call = handmade_batch(pool, past, new, "index" if step == 0 else form)
        tokens = CallTokens(call, overrides, nn.Module())
        now = [slice(before, before + count) for before, count in zip(past, new)]
        found = tokens.running_mean(0, torch.cat([values[row, part] for row, part in enumerate(now)]), HALF_LIFE)
        torch.testing.assert_close(found, torch.cat([wanted[row, part] for row, part in enumerate(now)]))
        keep_state(call, None, tokens)
        past = [before + count for before, count in zip(past, new)]


def test_changing_the_memory_during_a_continuous_batch_is_refused():
    pool = pool_of([[2, 7, 3]])
    overrides, call = Overrides({}), handmade_batch(pool, [0], [5], "index")
    tokens = CallTokens(call, overrides, nn.Module())
    keep_state(call, None, tokens)  # no running mean was computed
    with pytest.raises(ValueError, match="another memory, or none, was in force"):
        CallTokens(call, overrides, nn.Module()).running_mean(0, torch.randn(5), HALF_LIFE)
    pool = pool_of([[2, 7, 3]])
    call = handmade_batch(pool, [0], [5], "index")
    tokens = CallTokens(call, overrides, nn.Module())
    tokens.running_mean(0, torch.randn(5), HALF_LIFE)
    keep_state(call, None, tokens)
    with pytest.raises(ValueError, match="start a new generate_batch, with a new manager if it is persistent, or use"):
        CallTokens(call, Overrides({}), nn.Module()).running_mean(0, torch.randn(5), HALF_LIFE)
    keep_state(call, None, None)  # a forward without the memory
    with pytest.raises(ValueError, match="another memory, or none, was in force"):
        CallTokens(call, overrides, nn.Module()).running_mean(0, torch.randn(5), HALF_LIFE)


@pytest.mark.parametrize("form", ["index", "blocks"])
def test_a_batch_that_began_without_the_memory_is_refused(form):
    pool = pool_of([[2, 7, 3], [9, 4, 6]])
    call = handmade_batch(pool, [7, 3], [1, 1], form)  # its first forwards were those of a model without hooks
    for _ in range(2):
        with pytest.raises(ValueError, match="another memory, or none, was in force in earlier steps of this batch"):
            CallTokens(call, Overrides({}), nn.Module()).running_mean(0, torch.randn(2), HALF_LIFE)
    pool.cache = SimpleNamespace(cache_allocators={"full_attention": pool})
    pool.ledger = SimpleNamespace(hash_to_block={5: 2})  # of a prompt that is over, for others that begin like it
    call = handmade_batch(pool, [0, 0], [7, 3], "index")
    with pytest.raises(ValueError, match="another memory, or none, was in force in earlier steps of this batch"):
        CallTokens(call, Overrides({}), nn.Module()).running_mean(0, torch.randn(10), HALF_LIFE)


def test_the_sums_of_requests_that_are_moved_to_the_cpu_and_back_come_with_them(tokens, monkeypatch):
    model = contextual_model("olmoe")
    empty, keep, moved = torch.empty, PagedSums.keep_offloaded, []

    def keep_and_tell(self, requests, tables):
        moved.extend(requests)
        keep(self, requests, tables)

    # pinned memory needs an accelerator
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **(options | {"pin_memory": False})))
    monkeypatch.setattr(PagedSums, "keep_offloaded", keep_and_tell)
    prompts = [tokens[row % 3].roll(row) for row in range(6)]
    engine = dict(page_size=4, num_blocks=16, cpu_offload_space=0.01, allow_block_sharing=False, max_batch_tokens=32)
    found = continuous(model, prompts, new=24, **engine)
    assert moved
    assert_answers_as_uncached(model, found, 6)


# whose memory is in force

_CONTINUOUS = dict(use_cuda_graph=False, page_size=16, max_batch_tokens=64, num_blocks=64)


def batched(model, ids, **options):
    config = ContinuousBatchingConfig(**_CONTINUOUS)
    generation = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    found = model.generate_batch(ids.tolist(), generation_config=generation, continuous_batching_config=config)
    return torch.tensor([answer.generated_tokens for answer in found.values()])


def test_continuous_batches_run_with_what_is_in_force_for_their_caller(shared, tokens):
    expected = alone(shared, lambda model: generated(model, tokens)[:, tokens.shape[1] :][:, :6])
    assert len({tuple(found.flatten().tolist()) for found in expected.values()}) > 2
    for name in (*NAMES, None):
        events = []
        with in_context(shared, name), watch_lookups(shared, events.append):
            found = batched(shared, tokens[:1])
        assert torch.equal(found, expected[name]) and bool(events) == (name is not None)
    assert RoutingHooks.of(shared).users == 0


@pytest.mark.parametrize("change", CHANGES)
def test_a_continuous_batch_ends_with_what_it_began_with(shared, tokens, change):
    expected = batched(shared, tokens)
    handle, calls = None, []

    def act(*_):
        calls.append(0)
        if len(calls) == 3:
            in_thread(CHANGES[change], shared)

    handle = shared.lm_head.register_forward_hook(act)
    assert torch.equal(batched(shared, tokens), expected)
    handle.remove()
    assert bool(hooks_of(shared)) == (change != "detach all")


def test_a_request_is_refused_where_another_memory_is_in_force_than_in_its_manager(shared, tokens):
    options = dict(continuous_batching_config=ContinuousBatchingConfig(**_CONTINUOUS), warmup=False)
    generation = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=-1)
    with use_memory(shared, "music"):
        with shared.continuous_batching_context_manager(generation_config=generation, **options) as manager:
            with disable_memory(shared):
                with pytest.raises(ValueError, match="no memory is in force where .* started with the memory 'music'"):
                    manager.add_request(tokens[0].tolist())
            manager.add_request(tokens[0].tolist(), request_id="mine")
            assert manager.get_result("mine", timeout=20).error is None
