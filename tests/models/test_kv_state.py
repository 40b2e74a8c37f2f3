"""Running sums in a cache: chunks and generated tokens get the running means of the whole sequence."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from knnmoe_hf import attach_memory, detach_memory, disable_memory, set_memory
from knnmoe_hf.models.calls import CallTokens, Overrides, keep_state
from knnmoe_hf.models.sums import Sums, sums_beside
from tests.support.caches import CACHES, close, fed, padded, uncached
from tests.support.models import random_memory, tiny_model
from tests.support.running_means import HALF_LIFE, ByContext, contextual_model, put_on


@pytest.fixture
def contextual(family):
    return contextual_model(family)


def whole_past_cache(model):
    """A cache that can be cropped and indexed: GPT-OSS's default keeps only its sliding window."""
    return DynamicCache() if model.config.model_type == "gpt_oss" else DynamicCache(config=model.config)


# sequences in chunks


# each kind of cache with each way of cutting the tokens
@pytest.mark.parametrize(
    "kind, chunks, positions_given",
    [
        ("the model's", [1] * 12, False),
        ("dynamic", [5, 7], True),
        ("dynamic", [9, 1, 1, 1], False),
        ("lazy", [3, 1, 4, 4], True),
        ("static", [12], False),
        ("static", [3, 1, 4, 4], True),
        ("static", [9, 1, 1, 1], False),
    ],
    ids=str,
)
def test_chunks_get_the_means_of_the_whole_sequence(contextual, tokens, kind, chunks, positions_given):
    ids, mask = padded(tokens, "left")
    options = dict(position_ids=(mask.cumsum(-1) - 1).clamp_min(0)) if positions_given else {}
    whole = uncached(contextual, ids, mask, **options)
    cache, spare = CACHES[kind](contextual), 4 if kind == "static" else 0
    found, cache = fed(contextual, cache, ids, mask, chunks, spare, **options)
    close(found[mask == 1], whole[mask == 1])
    assert isinstance(sums_beside(cache), Sums) and len(cache.layers) == len(cache) == 2


def test_a_cropped_cache_continues_from_where_it_was_cut(contextual, tokens):
    other = torch.cat([tokens[:, :7], tokens.flip(0)[:, :5]], dim=1)
    _, cache = fed(contextual, whole_past_cache(contextual), tokens, chunks=[4, 8])
    cache.crop(-5)
    found, cache = fed(contextual, cache, other[:, 7:], chunks=[2, 1, 1, 1])
    close(found, uncached(contextual, other)[:, 7:])
    cache.crop(0)
    cache.crop(-12)
    close(fed(contextual, cache, tokens)[0], uncached(contextual, tokens))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_copies_of_a_prefix_serve_several_sequences(contextual, tokens, kind):
    prefix = tokens[:1, :6]
    _, cache = fed(contextual, CACHES[kind](contextual), prefix, chunks=[6])
    for row in range(3):
        ends = tokens[row : row + 1, 6:]
        found, _ = fed(contextual, copy.deepcopy(cache), ends, chunks=[3, 1, 2])
        close(found, uncached(contextual, torch.cat([prefix, ends], 1))[:, 6:])


def test_rows_of_a_cache_can_be_repeated_selected_and_reordered(contextual, tokens):
    _, cache = fed(contextual, whole_past_cache(contextual), tokens[:, :6], chunks=[6])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 2, 4]))
    cache.reorder_cache(torch.tensor([2, 0, 3, 1]))
    begun = tokens[torch.tensor([1, 0, 2, 0]), :6]
    ends = torch.cat([tokens[:, 6:], tokens[:1, :6]])
    close(fed(contextual, cache, ends, chunks=[2, 4])[0], uncached(contextual, torch.cat([begun, ends], 1))[:, 6:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_reset_cache_starts_from_zero_whatever_filled_it(contextual, tokens, kind):
    _, cache = fed(contextual, CACHES[kind](contextual), tokens, chunks=[12])
    held = sums_beside(cache)
    addresses = [table.data_ptr() for table in (held.count, held.values)] if kind == "static" else []
    for name in ("context", "again", "shorter"):
        cache.reset()
        put_on(contextual, name, half_life=2.0 if name == "shorter" else HALF_LIFE)
        close(fed(contextual, cache, tokens, chunks=[8, 3, 1])[0], uncached(contextual, tokens))
        if kind == "static" and name != "shorter":  # compiled graphs use their addresses
            assert sums_beside(cache) is held
            assert addresses == [table.data_ptr() for table in (held.count, held.values)]


def test_threads_with_separate_caches_do_not_interfere(tokens):
    model = contextual_model("olmoe")
    calls = [(tokens[:2, :length], kind) for length in (6, 11) for kind in CACHES]

    def run(call):
        ids, kind = call
        return fed(model, CACHES[kind](model), ids, chunks=[4] + [1] * (ids.shape[1] - 4))[0]

    expected = [run(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, calls * 4))
    for i, logits in enumerate(found):
        close(logits, expected[i % len(calls)])


@pytest.mark.parametrize("form", ["no mask", "2-D", "4-D"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_decoding_step_waits_for_no_device(kind, form):
    """On meta tensors, which have no values, whatever would fetch one from a device raises an error."""
    decoder, overrides, meta = tiny_model("olmoe").model, Overrides({}), torch.device("meta")
    cache = CACHES[kind](decoder)
    for past, new in ((0, 5), (5, 1), (6, 1)):
        width = 16 if kind == "static" else past + new
        mask = {
            "no mask": None,
            "2-D": torch.ones(3, width, device=meta),
            "4-D": torch.ones(3, 1, new, width, dtype=torch.bool, device=meta),
        }[form]
        positions = torch.arange(past, past + new, device=meta)[None]
        ids = torch.zeros(3, new, dtype=torch.long, device=meta)
        call = dict(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        found = CallTokens(call, overrides, decoder)
        assert found.running_mean(0, torch.zeros(3 * new, device=meta), HALF_LIFE).device == meta
        for layer in range(2):
            cache.update(*torch.zeros(2, 3, 2, new, 8, device=meta), layer)
        keep_state(call, None, found)
        assert isinstance(sums_beside(cache), Sums)


# generation


def generate(model, ids, mask=None, **options):
    defaults = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, disable_compile=True, output_logits=True)
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **(defaults | options))


def assert_as_uncached(model, out, start, mask=None):
    """All logits of a generation equal those of a pass without cache over the generated sequence."""
    steps = torch.stack(out.logits, dim=1)
    ids = out.sequences[:, : start + steps.shape[1]]
    if mask is not None:
        mask = F.pad(mask.repeat_interleave(len(ids) // len(mask), 0), (0, ids.shape[1] - start), value=1)
    whole = uncached(model, ids, mask)
    assert (steps - whole[:, start - 1 : start - 1 + steps.shape[1]]).abs().max() < 2e-4


WAYS = {
    "greedy": {},
    "no cache": dict(use_cache=False),
    "static": dict(cache_implementation="static"),
    "chunked prefill": dict(prefill_chunk_size=4),
    "chunked prefill, static": dict(prefill_chunk_size=4, cache_implementation="static"),
    "several of each": dict(num_return_sequences=3, do_sample=True),
    "several of each, static": dict(num_return_sequences=3, do_sample=True, cache_implementation="static"),
}


@pytest.mark.parametrize("way", WAYS)
def test_logits_of_generation_equal_those_without_a_cache(contextual, tokens, way):
    ids, mask = padded(tokens, "left")
    torch.manual_seed(0)
    assert_as_uncached(contextual, generate(contextual, ids, mask, **WAYS[way]), 12, mask)


def test_generation_with_a_sliding_window_in_every_layer_equals_a_pass_without_a_cache(tokens):
    model = contextual_model("qwen3_moe", use_sliding_window=True, sliding_window=6, max_window_layers=0)
    ids, mask = padded(tokens, "left")
    for way in ("greedy", "static", "chunked prefill"):
        assert_as_uncached(model, generate(model, ids, mask, **WAYS[way]), 12, mask)


def test_logits_of_speculative_decoding_equal_those_without_a_cache(family, contextual, tokens):
    repeating = tokens[:1, :4].repeat(1, 4)
    out = generate(contextual, repeating, prompt_lookup_num_tokens=4, max_new_tokens=16)
    assert_as_uncached(contextual, out, 16)
    for assistant in (contextual_model(family, seed=3), contextual_model(family), tiny_model(family, seed=1)):
        out = generate(contextual, tokens[:1], assistant_model=assistant, max_new_tokens=16)
        assert_as_uncached(contextual, out, 12)


@pytest.mark.parametrize("static", [False, True])
def test_scores_of_beams_equal_those_without_a_cache(contextual, tokens, static):
    ids, mask = padded(tokens, "left")
    options = dict(cache_implementation="static") if static else {}
    out = generate(
        contextual, ids, mask, num_beams=4, num_return_sequences=2, output_scores=True, length_penalty=0.0, **options
    )
    mask = F.pad(mask.repeat_interleave(2, 0), (0, 10), value=1)
    chances = uncached(contextual, out.sequences, mask)[:, 11:-1].log_softmax(-1)
    scores = chances.gather(2, out.sequences[:, 12:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, scores, atol=1e-4, rtol=1e-4)


# caches without sums, and caches that must be refused

WAY_OUT = "generate again without past_key_values, or use confidence='rbf'"


def assert_refused(model, cache, ids, reason):
    with pytest.raises(
        ValueError, match=rf"are not known for the tokens in this cache, because {reason}.*: {WAY_OUT}"
    ):
        model(input_ids=ids, past_key_values=cache)


def test_a_memory_without_running_means_adds_nothing_to_a_cache(family, tokens):
    model = tiny_model(family)
    attach_memory(model, random_memory(model))
    for kind, make in CACHES.items():
        _, cache = fed(model, make(model), tokens, chunks=[8, 4])
        assert len(cache.layers) == 2 and not isinstance(sums_beside(cache), Sums), kind


@pytest.mark.parametrize("kind", CACHES)
def test_inside_disable_memory_the_cache_has_no_sums(family, tokens, kind):
    model = tiny_model(family)
    wanted, _ = fed(model, CACHES[kind](model), tokens, chunks=[8, 1, 3])
    put_on(model)
    for _ in range(2):
        with disable_memory(model):
            found, cache = fed(model, CACHES[kind](model), tokens, chunks=[8, 1, 3])
            assert torch.equal(found, wanted) and not isinstance(sums_beside(cache), Sums)
        _, cache = fed(model, CACHES[kind](model), tokens, chunks=[8])
        assert isinstance(sums_beside(cache), Sums)
        with disable_memory(model):
            fed(model, CACHES[kind](model), tokens, chunks=[8])  # another cache
        close(fed(model, cache, tokens[:, 8:], chunks=[4])[0], uncached(model, tokens)[:, 8:])
        _, cache = fed(model, CACHES[kind](model), tokens, chunks=[8])
        with disable_memory(model):
            fed(model, cache, tokens[:, 8:], chunks=[1])
        assert not isinstance(sums_beside(cache), Sums)
    detach_memory(model)
    assert torch.equal(fed(model, CACHES[kind](model), tokens, chunks=[8, 1, 3])[0], wanted)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_was_filled_without_this_memory_is_refused(contextual, family, tokens, kind, new):
    go_on = tokens[:, :new]

    def filled():
        return fed(contextual, CACHES[kind](contextual), tokens[:, :8], chunks=[8])[1]

    with disable_memory(contextual):
        base_cache = filled()
    assert_refused(contextual, base_cache, go_on, "tokens were added to it without the memory in force")

    cache = filled()
    with disable_memory(contextual):  # for one token in between
        fed(contextual, cache, tokens[:, 8:9], chunks=[1])
    assert_refused(contextual, cache, go_on, "tokens were added to it without the memory in force")

    cache = filled()
    fed(tiny_model(family), cache, tokens[:, 8:9], chunks=[1])  # by a model that has no hooks
    assert_refused(
        contextual, cache, go_on, "a model without this memory, a call that failed, or other code added tokens to it"
    )
    cache = fed(tiny_model(family), CACHES[kind](contextual), tokens[:, :8], chunks=[8])[1]
    assert_refused(contextual, cache, go_on, "other code filled it")

    cache = filled()
    put_on(contextual, "other")
    assert_refused(contextual, cache, go_on, "it was filled with 'context' in force, not with 'other'")
    cache = filled()
    put_on(contextual, "other", half_life=2.0)  # another under the same name
    assert_refused(
        contextual, cache, go_on, "it was filled with another memory, or other options, in force than is now"
    )
    attach_memory(contextual, random_memory(contextual), "law")
    cache = filled()
    set_memory(contextual, "other")
    assert_refused(contextual, cache, go_on, "tokens were added to it with 'law' in force, which has no running means")


def test_a_copied_model_can_continue_the_originals_cache(contextual, tokens):
    _, cache = fed(contextual, None, tokens[:, :8], chunks=[8])
    twin = copy.deepcopy(contextual)
    close(fed(twin, cache, tokens[:, 8:], chunks=[3, 1])[0], uncached(twin, tokens)[:, 8:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_layer_that_skipped_a_forward_is_refused_and_others_continue(contextual, tokens, kind):
    class Sometimes(ByContext):
        on = True

        def __call__(self, x, output, tokens):
            return super().__call__(x, output, tokens) if self.on else None

    second = put_on(contextual, "sometimes", Sometimes)[1]
    _, cache = fed(contextual, CACHES[kind](contextual), tokens[:, :4], chunks=[4])
    second.on = False
    _, cache = fed(contextual, cache, tokens[:, 4:8], chunks=[3, 1])
    fed(contextual, copy.deepcopy(cache), tokens[:, 8:], chunks=[1, 3])
    second.on = True
    assert_refused(contextual, cache, tokens[:, 8:9], "the override in force computed no such running mean in layer 1")
