"""A running mean over a sequence is the same however its tokens reach the model."""

import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

from knnmoe_hf import attach_memory, native
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.calls import CallTokens, keep_state, sequence_starts
from knnmoe_hf.models.hooks import RoutingHooks
from knnmoe_hf.models.kv_state import StateOwner, SumsLayer
from tests.conftest import random_memory, tiny_model
from tests.models.test_padding_and_generation import LENGTHS, additive, padded
from tests.running_means import HALF_LIFE, ByContext, contextual_model, put_on


@pytest.fixture
def contextual(family):
    return contextual_model(family)


@pytest.fixture
def tokens():
    """(3, 12) token ids."""
    return torch.randint(96, (3, 12), generator=torch.Generator().manual_seed(2))


def close(one, other):
    torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


def logits_of(model, ids, mask=None, **options):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **options).logits


def uncached(model, ids, mask=None, **options):
    return logits_of(model, ids, mask, use_cache=False, **options)


# what a running mean is


def by_hand(values, real, restarts, half_life):
    """The same in Python, token by token, in float64."""
    found = torch.zeros(values.shape, dtype=torch.float64)
    for row in range(len(values)):
        total = weight = 0.0
        for t in range(values.shape[1]):
            if restarts[row, t]:
                total = weight = 0.0
            if real[row, t]:
                decay = 0.5 ** (1 / half_life)
                total, weight = total * decay + float(values[row, t]), weight * decay + 1
            found[row, t] = total / max(weight, 1e-30)
    return found


@pytest.fixture(params=["compiled", "plain"])
def either_way(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "kernels", None)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("length", [1, 2, 3, 8, 37])
@pytest.mark.parametrize("half_life", [0.5, 8.0, 1e4])
def test_a_running_mean_is_what_it_is_by_hand(length, half_life):
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(4, length, generator=generator)
    real = torch.rand(4, length, generator=generator) < 0.7
    restarts = torch.rand(4, length, generator=generator) < 0.1
    everything, nothing = torch.ones_like(real), torch.zeros_like(real)
    for given, begins in ((real, restarts), (real, nothing), (everything, restarts), (everything, nothing)):
        values[~given] = torch.nan  # what padding holds is of no account
        tokens = Tokens(
            4, length, None if given is everything else given.flatten(), None if begins is nothing else begins
        )
        found = tokens.running_mean(0, values.flatten(), half_life).view(4, length)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[given].double(), by_hand(values, given, begins, half_life)[given])
        values.nan_to_num_()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("half_life", [0.5, 8.0, 1e4])
def test_what_is_unseen_halves_with_each_half_life_of_real_tokens(half_life):
    generator = torch.Generator().manual_seed(3)
    real, restarts = (torch.rand(4, 37, generator=generator) < share for share in (0.7, 0.1))
    found = Tokens(4, 37, real.flatten(), restarts).warmup(half_life, torch.device("cpu")).view(4, 37)
    for row in range(4):
        count = 0
        for t in range(37):
            count = (0 if restarts[row, t] else count) + int(real[row, t])
            if real[row, t]:
                assert found[row, t].item() == pytest.approx(0.5 ** (count / half_life), abs=1e-5)


@pytest.mark.usefixtures("either_way")
def test_a_running_mean_is_exact_enough_over_a_long_sequence():
    values = 1 + torch.rand(1, 4096, generator=torch.Generator().manual_seed(0))
    everything, nothing = torch.ones(1, 4096, dtype=torch.bool), torch.zeros(1, 4096, dtype=torch.bool)
    for half_life in (8.0, 500.0, 1e6):
        found = Tokens(1, 4096).running_mean(0, values.flatten(), half_life)
        wanted = by_hand(values, everything, nothing, half_life)[0]
        assert ((found.double() - wanted) / wanted).abs().max() < 2e-6


def test_a_running_mean_passes_gradients_and_half_precision():
    values = torch.randn(6, dtype=torch.bfloat16).requires_grad_()
    mean = Tokens(2, 3).running_mean(0, values, 1.0)
    assert mean.dtype == torch.float32
    mean[4].backward()
    torch.testing.assert_close(values.grad.float(), torch.tensor([0, 0, 0, 1 / 3, 2 / 3, 0]), atol=1e-2, rtol=0)


class LastSums:
    """What a plain runtime would keep of a forward."""

    def __init__(self, tokens):
        self.sums = {series: sums[:, -1:] for series, sums in tokens.noted.items()}

    def carried(self, series):
        return self.sums[series]


def test_a_plain_runtime_may_carry_sequences_on_itself():
    values, real = torch.randn(2, 9), torch.rand(2, 9) < 0.6
    wanted = [Tokens(2, 9, real.flatten()).running_mean(layer, (values + layer).flatten(), 3.0) for layer in (0, 1)]
    state, parts = None, ([], [])
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        width = part.stop - part.start
        tokens = Tokens(2, width, real[:, part].flatten(), state=state)
        for layer in (0, 1):
            found = tokens.running_mean(layer, (values + layer)[:, part].flatten(), 3.0)
            parts[layer].append(found.view(2, width))
        state = LastSums(tokens)
    for layer in (0, 1):
        torch.testing.assert_close(torch.cat(parts[layer], 1)[real], wanted[layer].view(2, 9)[real])


def starts(positions, real=None, bounds=None):
    positions = None if positions is None else torch.tensor(positions)
    shape = (len(real), len(real[0])) if real is not None else (1, 6)
    real = None if real is None else torch.tensor(real).bool().flatten()
    bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    found = sequence_starts(positions, bounds, shape, real)
    return None if found is None else found.int().tolist()


def test_where_sequences_start():
    assert starts(None) is None
    assert starts([[0, 1, 2, 0, 1, 0]]) == [[1, 0, 0, 1, 0, 1]]
    assert starts([[5, 6, 7, 8, 3, 4]]) == [[0, 0, 0, 0, 1, 0]]  # the first goes on in a cache
    assert starts(None, bounds=[0, 2, 5, 6, 6]) == [[0, 0, 1, 0, 0, 1]]
    assert starts([[7, 8, 9, 3, 0, 1]], bounds=[0, 2, 3, 4, 6]) == [[0, 0, 1, 1, 1, 0]]  # 9 is another's


def test_padding_starts_no_sequence_and_ends_none():
    left = [[0, 0, 1, 1, 1, 1]]
    for positions in ([[0, 0, 0, 1, 2, 3]], [[1, 1, 0, 1, 2, 3]]):  # as `generate` fills them
        assert starts(positions, left) == [[0, 0, 1, 0, 0, 0]]
    assert starts([[0, 1, 2, 3, 4, 5]], left) == [[0, 0, 0, 0, 0, 0]]
    middle = [[1, 1, 0, 0, 1, 1]]
    for positions in ([[4, 5, 0, 0, 6, 7]], [[4, 5, 1, 1, 6, 7]], [[4, 5, 6, 7, 8, 9]]):
        assert starts(positions, middle) == [[0, 0, 0, 0, 0, 0]]
    assert starts([[4, 5, 0, 0, 0, 1]], middle) == [[0, 0, 0, 0, 1, 0]]
    assert starts([[0, 1, 2, 3, 0, 1]], left + middle) == [[0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0]]


# however the tokens reach the model

WIDE = dict(olmoe={}, qwen3_moe={}, gpt_oss=dict(sliding_window=64))  # to which padding does not count as tokens


def test_the_running_mean_matters(contextual, tokens):
    whole = uncached(contextual, tokens)
    hooks = RoutingHooks.of(contextual)
    put_on(contextual, "own", half_life=1e-3)  # the token's own value
    own = uncached(contextual, tokens)
    assert (whole - own)[:, 1:].abs().amax(-1).median() > 0.05
    close(whole[:, 0], own[:, 0])
    assert hooks is RoutingHooks.of(contextual)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_padded_batch_is_what_it_is_alone(family, tokens, side, attention):
    if (family, attention) == ("gpt_oss", "sdpa"):
        pytest.skip("has none")
    model = contextual_model(family, attn_implementation=attention)
    ids, mask = padded(tokens, side)
    together = uncached(model, ids, mask)
    for row, length in enumerate(LENGTHS):
        close(together[row][mask[row] == 1], uncached(model, tokens[row : row + 1, :length])[0])


def fed(model, cache, ids, mask=None, chunks=(1,) * 12, spare=0, position_ids=None):
    """Logits of ids fed in chunks, and the cache that holds them."""
    parts, start = [], 0
    for size in chunks:
        new = slice(start, start + size)
        options = {} if position_ids is None else dict(position_ids=position_ids[:, new])
        if mask is not None:
            options["attention_mask"] = F.pad(mask[:, : new.stop], (0, spare))
        with torch.no_grad():
            out = model(input_ids=ids[:, new], past_key_values=cache, use_cache=True, **options)
        cache, start = out.past_key_values, new.stop
        parts.append(out.logits)
    return torch.cat(parts, 1), cache


CACHES = {
    "the model's": lambda model: None,
    "dynamic": lambda model: DynamicCache(config=model.config),
    "lazy": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=16),
}


@pytest.mark.parametrize("chunks", [[1] * 12, [12], [5, 7], [9, 1, 1, 1], [3, 1, 4, 4]], ids=str)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("said", [True, False], ids=["positions", "no positions"])
def test_a_cache_gives_the_same_as_the_whole_sequence(contextual, tokens, kind, chunks, said):
    ids, mask = padded(tokens, "left")
    options = dict(position_ids=(mask.cumsum(-1) - 1).clamp_min(0)) if said else {}
    whole = uncached(contextual, ids, mask, **options)
    cache, spare = CACHES[kind](contextual), 4 if kind == "static" else 0
    found, cache = fed(contextual, cache, ids, mask, chunks, spare, **options)
    close(found[mask == 1], whole[mask == 1])
    assert isinstance(cache.layers[-1], SumsLayer) and len(cache.layers) == 3


def test_padding_between_the_turns_of_a_chat_changes_nothing(family, tokens):
    contextual = contextual_model(family, **WIDE[family])
    ids = torch.cat([tokens[:, :5], torch.zeros_like(tokens[:, :2]), tokens[:, 5:]], dim=1)
    mask = torch.ones_like(ids)
    mask[:, 5:7] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    found, _ = fed(contextual, None, ids, mask, [6, 3, 1, 1, 3], position_ids=positions)
    close(found[mask == 1].view(3, 12, -1), uncached(contextual, tokens))


def packed_calls(tokens, boolean):
    """Arguments that pack the first `LENGTHS` tokens of each row into one."""
    ids = torch.cat([tokens[row, :length] for row, length in enumerate(LENGTHS)])[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    number = torch.cat([torch.full((length,), row) for row, length in enumerate(LENGTHS)])
    square = ((number[:, None] == number) & torch.ones(len(number), len(number)).tril().bool())[None, None]
    bounds = dict(cu_seq_lens_q=torch.tensor([0, 12, 19, 23], dtype=torch.int32))
    yield "positions", dict(input_ids=ids, position_ids=positions)
    for form in [square, additive(square)][not boolean :]:
        yield "mask", dict(input_ids=ids, position_ids=positions, attention_mask=form)
        yield "bounds", dict(input_ids=ids, attention_mask=form, **bounds)
        yield "both", dict(input_ids=ids, position_ids=positions, attention_mask=form, **bounds)


def test_packed_rows_are_what_they_are_alone(family, tokens):
    model = contextual_model(family, **WIDE[family])
    wanted = torch.cat([uncached(model, tokens[i : i + 1, :n])[0] for i, n in enumerate(LENGTHS)])
    for form, call in packed_calls(tokens, boolean=family != "gpt_oss"):
        if family == "gpt_oss" and form == "positions":
            continue  # it makes no mask of positions: without a memory too its packed rows see each other
        if family == "gpt_oss":
            call["attention_mask"] = {f"{kind}_attention": call["attention_mask"] for kind in ("full", "sliding")}
        with torch.no_grad():
            found = model(**call, use_cache=False).logits[0]
        assert (found - wanted).abs().max() < 1e-4, form


def test_position_0_starts_anew_in_a_filled_cache(contextual, tokens):
    route = RoutingHooks.of(contextual).current[1]
    _, cache = fed(contextual, None, tokens, chunks=[12])
    everything, nothing = torch.ones(3, 24, dtype=torch.bool), torch.zeros(3, 24, dtype=torch.bool)
    for positions in (torch.arange(12), torch.arange(12, 24)):
        fed(contextual, copy.deepcopy(cache), tokens, chunks=[5, 1, 6], position_ids=positions.expand(3, -1))
        values, means = (
            torch.cat([part.view(3, -1) for part in seen[-4:]], 1) for seen in (route.values, route.means)
        )
        begins = nothing.clone()
        begins[:, 12] = positions[0] == 0
        torch.testing.assert_close(means.double(), by_hand(values, everything, begins, HALF_LIFE), atol=1e-5, rtol=0)
        route.values, route.means = route.values[:1], route.means[:1]


def test_an_end_token_does_not_start_anew(contextual, tokens):
    wanted = uncached(contextual, tokens)
    contextual.config.eos_token_id = contextual.generation_config.eos_token_id = int(tokens[0, 4])
    contextual.config.pad_token_id = int(tokens[0, 6])
    assert torch.equal(uncached(contextual, tokens), wanted)


def test_a_cropped_cache_goes_on_where_it_was_cut(contextual, tokens):
    if contextual.config.model_type == "gpt_oss":
        cache = DynamicCache()  # whose layers keep the whole past
    else:
        cache = DynamicCache(config=contextual.config)
    other = torch.cat([tokens[:, :7], tokens.flip(0)[:, :5]], dim=1)
    _, cache = fed(contextual, cache, tokens, chunks=[4, 8])
    cache.crop(-5)
    found, cache = fed(contextual, cache, other[:, 7:], chunks=[2, 1, 1, 1])
    close(found, uncached(contextual, other)[:, 7:])
    cache.crop(0)
    cache.crop(-12)
    close(fed(contextual, cache, tokens)[0], uncached(contextual, tokens))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_copied_prefix_serves_several_sequences(contextual, tokens, kind):
    prefix = tokens[:1, :6]
    _, cache = fed(contextual, CACHES[kind](contextual), prefix, chunks=[6])
    for row in range(3):
        ends = tokens[row : row + 1, 6:]
        found, _ = fed(contextual, copy.deepcopy(cache), ends, chunks=[3, 1, 2])
        close(found, uncached(contextual, torch.cat([prefix, ends], 1))[:, 6:])


def test_rows_of_a_cache_may_be_repeated_chosen_and_reordered(contextual, tokens):
    if contextual.config.model_type == "gpt_oss":
        cache = DynamicCache()
    else:
        cache = DynamicCache(config=contextual.config)
    _, cache = fed(contextual, cache, tokens[:, :6], chunks=[6])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 2, 4]))
    cache.reorder_cache(torch.tensor([2, 0, 3, 1]))
    begun = tokens[torch.tensor([1, 0, 2, 0]), :6]
    ends = torch.cat([tokens[:, 6:], tokens[:1, :6]])
    close(fed(contextual, cache, ends, chunks=[2, 4])[0], uncached(contextual, torch.cat([begun, ends], 1))[:, 6:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_reset_cache_begins_anew_whoever_filled_it(contextual, tokens, kind):
    _, cache = fed(contextual, CACHES[kind](contextual), tokens, chunks=[12])
    held = cache.layers[-1]
    addresses = [table.data_ptr() for table in (held.count, held.table)] if kind == "static" else []
    for name in ("context", "again", "shorter"):
        cache.reset()
        put_on(contextual, name, half_life=2.0 if name == "shorter" else HALF_LIFE)
        close(fed(contextual, cache, tokens, chunks=[8, 3, 1])[0], uncached(contextual, tokens))
        if kind == "static" and name != "shorter":  # compiled graphs hold on to them
            assert cache.layers[-1] is held
            assert addresses == [table.data_ptr() for table in (held.count, held.table)]


# generation


def generate(model, ids, mask=None, **options):
    defaults = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, disable_compile=True, output_logits=True)
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **(defaults | options))


def assert_as_uncached(model, out, start, mask=None):
    """Every logit that generation saw is that of an uncached pass over what was generated."""
    steps = torch.stack(out.logits, dim=1)
    ids = out.sequences[:, : start + steps.shape[1]]
    if mask is not None:
        mask = F.pad(mask.repeat_interleave(len(ids) // len(mask), 0), (0, ids.shape[1] - start), value=1)
    whole = uncached(model, ids, mask)
    assert (steps - whole[:, start - 1 : start - 1 + steps.shape[1]]).abs().max() < 2e-4


MANNERS = {
    "greedy": {},
    "no cache": dict(use_cache=False),
    "static": dict(cache_implementation="static"),
    "chunked prefill": dict(prefill_chunk_size=4),
    "chunked prefill, static": dict(prefill_chunk_size=4, cache_implementation="static"),
    "several of each": dict(num_return_sequences=3, do_sample=True),
    "several of each, static": dict(num_return_sequences=3, do_sample=True, cache_implementation="static"),
}


@pytest.mark.parametrize("manner", MANNERS)
def test_generation_sees_the_logits_of_an_uncached_pass(contextual, tokens, manner):
    ids, mask = padded(tokens, "left")
    torch.manual_seed(0)
    assert_as_uncached(contextual, generate(contextual, ids, mask, **MANNERS[manner]), 12, mask)


def test_a_window_that_slides_in_every_layer_is_no_hindrance(tokens):
    model = contextual_model("qwen3_moe", use_sliding_window=True, sliding_window=6, max_window_layers=0)
    ids, mask = padded(tokens, "left")
    for manner in ("greedy", "static", "chunked prefill"):
        assert_as_uncached(model, generate(model, ids, mask, **MANNERS[manner]), 12, mask)


def test_speculation_sees_the_logits_of_an_uncached_pass(family, contextual, tokens):
    repeating = tokens[:1, :4].repeat(1, 4)
    out = generate(contextual, repeating, prompt_lookup_num_tokens=4, max_new_tokens=16)
    assert_as_uncached(contextual, out, 16)
    for assistant in (contextual_model(family, seed=3), contextual_model(family), tiny_model(family, seed=1)):
        out = generate(contextual, tokens[:1], assistant_model=assistant, max_new_tokens=16)
        assert_as_uncached(contextual, out, 12)


@pytest.mark.parametrize("static", [False, True])
def test_beams_score_what_an_uncached_pass_scores(contextual, tokens, static):
    ids, mask = padded(tokens, "left")
    options = dict(cache_implementation="static") if static else {}
    out = generate(
        contextual, ids, mask, num_beams=4, num_return_sequences=2, output_scores=True, length_penalty=0.0, **options
    )
    mask = F.pad(mask.repeat_interleave(2, 0), (0, 10), value=1)
    chances = uncached(contextual, out.sequences, mask)[:, 11:-1].log_softmax(-1)
    scores = chances.gather(2, out.sequences[:, 12:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, scores, atol=1e-4, rtol=1e-4)


# continuous batching

ENGINES = {
    "plain": {},
    "prefill in parts": dict(max_batch_tokens=8, page_size=4),
    "nothing shared": dict(allow_block_sharing=False, page_size=4),
    "one at a time": dict(max_requests_per_batch=1, page_size=4),
}


def continuous(model, prompts, children=1, new=8, **options):
    """Tokens and log probabilities of each answer, by request."""
    options = dict(page_size=16, max_batch_tokens=64, num_blocks=64) | options
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
        chances = whole[at, torch.tensor(new)]
        torch.testing.assert_close(torch.tensor(answer.logprobs), chances, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_continuous_batching_answers_as_an_uncached_pass(contextual, tokens, engine):
    prompts = [tokens[row, :length] for row, length in enumerate(LENGTHS)]
    prompts += [torch.cat([tokens[0], tokens[1, :5]]), torch.cat([tokens[0], tokens[1, :5]])]  # prefixes are shared
    found = continuous(contextual, prompts, **ENGINES[engine])
    assert_answers_as_uncached(contextual, found, len(prompts))


def test_continuous_batching_of_several_answers_each_forks_their_sums(contextual, tokens):
    prompts = [tokens[row, :length] for row, length in enumerate(LENGTHS)]
    found = continuous(contextual, prompts, children=3, page_size=4)
    assert_answers_as_uncached(contextual, found, 9)


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
    pool = SimpleNamespace(
        index=0, layer_type="full_attention", tokens_per_page=4, block_physical_stride=24, num_blocks=8,
        blocks_per_sector=1, blocks=[[2, 7, 3], [9, 4, 6]], copy_blocks=lambda source, target: None,
    )  # fmt: skip
    pool.cache = SimpleNamespace(cache_allocators={"full_attention": pool})
    values, owner = torch.randn(2, 12), StateOwner()
    wanted = Tokens(2, 12).running_mean(0, values.flatten(), HALF_LIFE).view(2, 12)
    past = [0, 0]
    for step, new in enumerate([[7, 3], [1, 1], [1, 1], [1, 1], [1, 1]]):
        call = handmade_batch(pool, past, new, "index" if step == 0 else form)
        tokens = CallTokens(call, owner)
        now = [slice(before, before + count) for before, count in zip(past, new)]
        found = tokens.running_mean(0, torch.cat([values[row, part] for row, part in enumerate(now)]), HALF_LIFE)
        torch.testing.assert_close(found, torch.cat([wanted[row, part] for row, part in enumerate(now)]))
        keep_state(call, None, tokens)
        past = [before + count for before, count in zip(past, new)]


# compilers, threads, checkpoints


def test_gradient_checkpointing_recomputes_the_same_means_even_over_two_batches(family, tokens):
    model = contextual_model(family)
    calls = [padded(tokens, side) for side in ("left", "right")]

    def gradients(reentrant):
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        model.zero_grad()
        sum(model(input_ids=i, attention_mask=m, labels=i.masked_fill(m == 0, -100)).loss for i, m in calls).backward()
        model.eval()
        model.activation_checkpointing_disable()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(None)
    for reentrant in (False, True):
        found = gradients(reentrant)
        assert set(found) == set(wanted)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-3, msg=name)


def test_threads_with_caches_of_their_own_do_not_meet(tokens):
    model = contextual_model("olmoe")
    calls = [(tokens[:2, :length], kind) for length in (6, 12, 11) for kind in CACHES]

    def run(call):
        ids, kind = call
        return fed(model, CACHES[kind](model), ids, chunks=[4] + [1] * (ids.shape[1] - 4))[0]

    expected = [run(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, calls * 8))
    for i, logits in enumerate(found):
        close(logits, expected[i % len(calls)])


# no trace, and no cache that was filled otherwise

REFUSED = "filled without the memory in force.*generate anew without past_key_values, or use confidence='rbf'"


def test_routes_without_running_means_leave_no_trace_in_a_cache(family, tokens):
    model = tiny_model(family)
    attach_memory(model, random_memory(model))
    for kind, make in CACHES.items():
        _, cache = fed(model, make(model), tokens, chunks=[8, 4])
        assert len(cache.layers) == 2, kind


@pytest.mark.parametrize("kind", CACHES)
def test_out_of_force_the_model_is_the_base_model_and_its_cache_a_plain_one(family, tokens, kind):
    model = tiny_model(family)
    wanted, _ = fed(model, CACHES[kind](model), tokens, chunks=[8, 1, 3])
    hooks = put_on(model)
    for _ in range(2):
        with hooks.suspended():
            found, cache = fed(model, CACHES[kind](model), tokens, chunks=[8, 1, 3])
            assert torch.equal(found, wanted) and len(cache.layers) == 2
        _, cache = fed(model, CACHES[kind](model), tokens, chunks=[8])
        assert len(cache.layers) == 3
        with hooks.suspended():
            fed(model, CACHES[kind](model), tokens, chunks=[8])  # another cache
        close(fed(model, cache, tokens[:, 8:], chunks=[4])[0], uncached(model, tokens)[:, 8:])
        _, cache = fed(model, CACHES[kind](model), tokens, chunks=[8])
        with hooks.suspended():
            fed(model, cache, tokens[:, 8:], chunks=[1])
        assert len(cache.layers) == 2
    hooks.remove()
    assert torch.equal(fed(model, CACHES[kind](model), tokens, chunks=[8, 1, 3])[0], wanted)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_was_filled_otherwise_is_refused(contextual, family, tokens, kind, new):
    hooks = RoutingHooks.of(contextual)
    go_on = tokens[:, :new]

    def refused(cache):
        with pytest.raises(ValueError, match=REFUSED):
            contextual(input_ids=go_on, past_key_values=cache)

    with hooks.suspended():  # without the memory
        (refused_later,) = [fed(contextual, CACHES[kind](contextual), tokens[:, :8], chunks=[8])[1]]
    refused(refused_later)

    _, cache = fed(contextual, CACHES[kind](contextual), tokens[:, :8], chunks=[8])
    with hooks.suspended():  # in between
        fed(contextual, cache, tokens[:, 8:9], chunks=[1])
    refused(cache)

    _, cache = fed(contextual, CACHES[kind](contextual), tokens[:, :8], chunks=[8])
    fed(tiny_model(family), cache, tokens[:, 8:9], chunks=[1])  # by a model that has no hooks
    refused(cache)

    _, cache = fed(contextual, CACHES[kind](contextual), tokens[:, :8], chunks=[8])
    put_on(contextual, "other")
    refused(cache)
    _, cache = fed(contextual, CACHES[kind](contextual), tokens[:, :8], chunks=[8])
    put_on(contextual, "other", half_life=2.0)  # another under the same name
    refused(cache)
    twin = copy.deepcopy(contextual)  # whose routes are the same
    _, cache = fed(contextual, CACHES[kind](contextual), tokens[:, :8], chunks=[8])
    close(fed(twin, cache, go_on, chunks=[new])[0], uncached(twin, torch.cat([tokens[:, :8], go_on], 1))[:, 8:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_layer_that_skipped_a_forward_is_refused_and_others_go_on(contextual, tokens, kind):
    class Sometimes(ByContext):
        def __call__(self, x, routes, tokens):
            return super().__call__(x, routes, tokens) if self.asks else None

    put_on(contextual, "sometimes", Sometimes)
    first, second = RoutingHooks.of(contextual).current.values()
    first.asks, second.asks = True, True
    _, cache = fed(contextual, CACHES[kind](contextual), tokens[:, :4], chunks=[4])
    second.asks = False
    _, cache = fed(contextual, cache, tokens[:, 4:8], chunks=[3, 1])
    fed(contextual, copy.deepcopy(cache), tokens[:, 8:], chunks=[1, 3])
    second.asks = True
    with pytest.raises(ValueError, match=REFUSED):
        fed(contextual, cache, tokens[:, 8:], chunks=[1])


def test_an_engine_that_changed_its_memory_is_refused():
    allocator = SimpleNamespace(
        index=0, layer_type="full_attention", tokens_per_page=4, block_physical_stride=24, num_blocks=8,
        blocks_per_sector=1, blocks=[[2, 7, 3]], copy_blocks=lambda source, target: None,
    )  # fmt: skip
    allocator.cache = SimpleNamespace(cache_allocators={"full_attention": allocator})
    owner, call = StateOwner(), handmade_batch(allocator, [0], [5], "index")
    tokens = CallTokens(call, owner)
    keep_state(call, None, tokens)  # nothing asked: no trace
    assert vars(allocator.cache).keys() == {"cache_allocators"}
    tokens.running_mean(0, torch.randn(5), HALF_LIFE)
    keep_state(call, None, tokens)
    with pytest.raises(ValueError, match="start a new generate_batch, or use confidence='rbf'"):
        CallTokens(call, StateOwner()).running_mean(0, torch.randn(5), HALF_LIFE)
    keep_state(call, None, None)  # a forward without the memory
    with pytest.raises(ValueError, match="another memory, or none, was in force"):
        CallTokens(call, owner).running_mean(0, torch.randn(5), HALF_LIFE)
