"""Reading from a decoder's arguments which tokens are real and which token each of them goes on from."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.predecessors import CallLayout, named_arguments
from tests.support.caches import WIDE, additive, close, fed, padded, uncached
from tests.support.models import tiny_model
from tests.support.running_means import contextual_model
from tests.support.trees import PAD, attended, depths, each_alone, mask_for, random_parents, running_means_by_hand


def decoder(**config):
    """What is read of a decoder."""
    known = dict(_attn_implementation="sdpa", use_cache=False, model_type="olmoe")
    return SimpleNamespace(config=SimpleNamespace(**(known | config)), training=False)


def real_tokens(call):
    return CallLayout(call, decoder()).real


# real tokens


def test_a_mask_of_four_dimensions_gives_the_same_real_tokens_as_one_of_two(tokens):
    embeddings = tiny_model("olmoe").get_input_embeddings()
    for side in ("left", "right"):
        ids, mask = padded(tokens, side)
        causal = torch.ones(12, 12, dtype=torch.bool).tril()
        square = (causal & mask[:, None, :].bool())[:, None]  # (B, 1, S, S)
        for form in (square, additive(square), additive(square) - 0.1, square.expand(-1, 4, -1, -1)):
            for given in (form, {"full_attention": form, "sliding_attention": form}, {"sliding_attention": form}):
                found = real_tokens({"input_ids": ids, "attention_mask": given})
                assert torch.equal(found.view_as(mask), mask.bool())
                found = real_tokens(named_arguments((ids, given), {}))
                assert torch.equal(found.view_as(mask), mask.bool())
        found = real_tokens({"inputs_embeds": embeddings(ids), "attention_mask": mask})
        assert torch.equal(found.view_as(mask), mask.bool())
    broadcast = causal[None, None]
    assert real_tokens({"input_ids": ids, "attention_mask": broadcast}).shape == (36,)


def test_without_a_mask_all_tokens_are_real(tokens):
    for nothing in (None, {"full_attention": None}, {}):
        assert real_tokens({"input_ids": tokens, "attention_mask": nothing}) is None


# where sequences start without a mask of four dimensions


def starts(positions, mask=None, bounds=None, past=0, **config):
    call = {"input_ids": torch.zeros(1, 6), "position_ids": None if positions is None else torch.tensor(positions)}
    if mask is not None:
        call["attention_mask"] = torch.tensor(mask)
        call["input_ids"] = torch.zeros(len(mask), 6)
    if bounds is not None:
        call["cu_seq_lens_q"] = torch.tensor(bounds, dtype=torch.int32)
    if past:
        call["past_key_values"] = DynamicCache([(torch.zeros(1, 2, past, 4), torch.zeros(1, 2, past, 4))])
    found = CallLayout(call, decoder(**config)).sources().links.restarts
    return None if found is None else found[:, 1:].int().tolist()


def test_sequences_start_at_position_0_and_at_given_bounds():
    assert starts(None) is None
    assert starts([[0, 1, 2, 0, 1, 0]]) == [[0, 0, 1, 0, 1]]
    assert starts([[0, 1, 2, 0, 1, 0]], past=3) == [[0, 0, 1, 0, 1]]
    assert starts(None, bounds=[0, 2, 5, 6, 6]) == [[0, 1, 0, 0, 1]]
    assert starts([[7, 8, 9, 3, 0, 1]], bounds=[0, 2, 3, 4, 6]) == [[0, 1, 1, 1, 0]]  # 9 belongs to another


def test_a_jump_starts_a_sequence_only_where_the_model_hides_what_is_before_it():
    jumping = [[5, 6, 7, 9, 3, 4]]
    alone, together = [[0, 0, 1, 1, 0]], [[0, 0, 0, 0, 0]]
    assert starts(jumping) == starts(jumping, _attn_implementation="eager") == alone
    assert starts(jumping, past=5) == starts(jumping, mask=[[1] * 6]) == together
    assert starts(jumping, use_cache=True) == starts(jumping, _attn_implementation="flash_attention_2") == together
    assert starts(jumping, model_type="gpt_oss") == starts(jumping, _attn_implementation="paged|eager") == together


@pytest.mark.parametrize("use_cache", [False, True])
def test_the_model_hides_what_is_before_a_jump_exactly_where_this_is_expected(family, tokens, use_cache):
    model, ids = tiny_model(family, **WIDE[family]), tokens[:1]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14]])
    other = torch.cat([tokens[1:2, :6], ids[:, 6:]], dim=1)
    with torch.no_grad():
        one, two = (model(given, position_ids=positions, use_cache=use_cache).logits[:, 6:] for given in (ids, other))
    call = {"input_ids": ids, "position_ids": positions, "use_cache": use_cache}
    begins = CallLayout(call, model.model).sources().links.restarts[0, 6]
    assert torch.allclose(one, two, atol=1e-4) == bool(begins)


def test_padding_starts_no_sequence_and_ends_none():
    left = [[0, 0, 1, 1, 1, 1]]
    for positions in ([[0, 0, 0, 1, 2, 3]], [[1, 1, 0, 1, 2, 3]]):  # as `generate` fills in positions of padding
        assert starts(positions, left) == [[0, 1, 0, 0, 0]]
    assert starts([[0, 1, 2, 3, 4, 5]], left) == [[0, 0, 0, 0, 0]]
    middle = [[1, 1, 0, 0, 1, 1]]
    for positions in ([[4, 5, 0, 0, 6, 7]], [[4, 5, 1, 1, 6, 7]], [[4, 5, 6, 7, 8, 9]]):
        assert starts(positions, middle) == [[0, 0, 0, 0, 0]]
    assert starts([[4, 5, 0, 0, 0, 1]], middle) == [[0, 0, 0, 1, 0]]
    assert starts([[0, 1, 2, 3, 0, 1]], left + middle) == [[0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]


def test_of_positions_in_several_dimensions_only_those_in_the_text_start_sequences():
    text, image = [[0, 1, 2, 0, 1, 2]], [[0, 0, 0, 0, 0, 0]]
    assert starts([text, image, image, image]) == [[0, 0, 1, 0, 0]]
    assert starts([text, image, image]) is None


def entries(past, mask):
    """The slots that the first of two new tokens of each row go on from."""
    cache = StaticCache(config=tiny_model("olmoe").config, max_cache_len=8)
    cache.early_initialization(len(mask), 2, 8, torch.float32, torch.device("cpu"))
    for layer in cache.layers:
        layer.cumulative_length.fill_(past)
    grown = DynamicCache([(torch.zeros(len(mask), 2, past, 4), torch.zeros(len(mask), 2, past, 4))])
    found = []
    for one in (cache, grown):
        call = {"input_ids": torch.zeros(len(mask), 2), "attention_mask": torch.tensor(mask), "past_key_values": one}
        entry = CallLayout(call, decoder()).sources().entry
        found.append([past - 1] * len(mask) if entry is None else entry.tolist())
    assert found[0] == found[1]
    return found[0]


def test_a_row_goes_on_from_its_last_slot_that_a_mask_of_two_dimensions_shows():
    assert entries(4, [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]) == [3, 3]
    assert entries(4, [[1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]) == [1, -1]
    assert entries(4, [[1, 1], [0, 1]]) == [3, 3]  # of the new tokens alone, as hybrid models get it


# predecessors by a mask of four dimensions


def forms_of(square):
    rows, _, length, columns = square.shape
    yield square
    yield additive(square)
    yield additive(square).to(torch.bfloat16) - 0.1
    yield additive(square).clamp_min(-1e4).to(torch.bfloat16).float()  # rounded to -9984
    yield square.expand(-1, 4, -1, -1)
    yield {"full_attention": square, "sliding_attention": square.tril(0)}
    yield {"full_attention": create_block_mask(
        lambda b, h, q, k: square[b, 0, q, k], rows, None, length, columns, device="cpu", BLOCK_SIZE=8
    )}  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_running_means_follow_random_trees(seed):
    parents = random_parents(3, 23, seed)
    values = torch.randn(3, 23, generator=torch.Generator().manual_seed(seed))
    real = parents != PAD
    for half_life in (0.7, 24.0):
        wanted = running_means_by_hand(values, parents, half_life)
        for form in forms_of(attended(parents)):
            layout = CallLayout({"input_ids": values, "attention_mask": form}, decoder())
            assert torch.equal(layout.real.view(3, 23), real)
            links = layout.sources().links
            found = Tokens(3, 23, layout.real, links).running_mean(0, values.flatten(), half_life).view(3, 23)
            torch.testing.assert_close(found.double()[real], wanted[real], atol=1e-5, rtol=1e-5)


def test_a_mask_of_chains_is_computed_as_chains_and_one_with_forks_is_not():
    for seed, branches in ((0, False), (1, True)):
        parents = random_parents(2, 9, seed, padding=0.3)
        if not branches:
            parents = torch.where(parents >= 0, torch.arange(9) - 1, parents)
            parents[:, 1:][parents[:, :-1] == PAD] = -1
            parents[:, 0] = -1
        links = CallLayout({"input_ids": parents, "attention_mask": attended(parents)}, decoder()).sources().links
        assert (links.before is None) != branches


CHUNKS = ([16], [1] * 16, [5, 1, 7, 3], [9, 7])


@pytest.mark.parametrize("seed, chunks", list(enumerate(CHUNKS)), ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_each_token_of_a_tree_gives_what_a_pass_over_its_own_past_gives(family, seed, chunks, kind):
    model = contextual_model(family, attn_implementation="eager", **WIDE[family])
    parents = random_parents(2, 16, seed, padding=0.2)
    ids = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(seed))
    wanted, mask, positions = each_alone(model, ids, parents), attended(parents), depths(parents)
    cache, start, found = DynamicCache(), 0, []
    if kind == "static":
        cache, mask = StaticCache(config=model.config, max_cache_len=20), torch.nn.functional.pad(mask, (0, 4))
    for size in chunks:
        new, seen = slice(start, start + size), (20 if kind == "static" else start + size)
        given = mask_for(model, mask[:, :, new, :seen], boolean=False)
        with torch.no_grad():
            out = model(ids[:, new], given, position_ids=positions[:, new], past_key_values=cache)
        found.append(out.logits)
        start += size
    close(torch.cat(found, 1)[parents != PAD], wanted[parents != PAD])


def test_continuations_of_a_cached_prefix_are_judged_apart(family, tokens):
    """Several continuations in one row, as in tree attention: each token is at the position after its own past."""
    model = contextual_model(family, attn_implementation="eager", **WIDE[family])
    parents = torch.cat([torch.arange(6) - 1, torch.tensor([5, 6, 5, 8, 8, 3])])[None]
    ids, mask, positions = tokens[:1], attended(parents), depths(parents)
    wanted = each_alone(model, ids, parents)
    for first in (6, 8, 3):
        _, cache = fed(model, DynamicCache(), ids, chunks=[first])
        with torch.no_grad():
            given = mask_for(model, mask[:, :, first:], boolean=False)
            found = model(ids[:, first:], given, position_ids=positions[:, first:], past_key_values=cache).logits
        close(found, wanted[:, first:])
    # what was not accepted is hidden by a mask of two dimensions
    keep = torch.tensor([[1] * 6 + [0, 0, 1, 0, 1, 0] + [1]])
    _, cache = fed(model, DynamicCache(), ids, chunks=[6])
    with torch.no_grad():
        given = mask_for(model, mask[:, :, 6:], boolean=False)
        model(ids[:, 6:], given, position_ids=positions[:, 6:], past_key_values=cache)
        found = model(tokens[1:2, :1], keep, position_ids=torch.tensor([[8]]), past_key_values=cache).logits
    path = torch.cat([ids[:, :6], ids[:, [8, 10]], tokens[1:2, :1]], dim=1)
    close(found[:, 0], uncached(model, path)[:, -1])
