"""Reading from a decoder's arguments which tokens are real and where sequences start."""

import pytest
import torch

from knnmoe_hf.models.calls import named_arguments, real_tokens, sequence_starts
from tests.support.caches import (
    LENGTHS,
    WIDE,
    additive,
    close,
    fed,
    gradients,
    packed_calls,
    padded,
    running_mean_by_hand,
    uncached,
)
from tests.support.models import tiny_model
from tests.support.running_means import HALF_LIFE, contextual_model, put_on

# real tokens


def test_a_mask_of_four_dimensions_gives_the_same_real_tokens_as_one_of_two(tokens):
    embeddings = tiny_model("olmoe").get_input_embeddings()
    for side in ("left", "right"):
        ids, mask = padded(tokens, side)
        causal = torch.ones(12, 12, dtype=torch.bool).tril()
        square = (causal & mask[:, None, :].bool())[:, None]  # (B, 1, S, S)
        for form in (square, additive(square), additive(square) - 0.1):
            for given in (form, {"full_attention": form, "sliding_attention": form}, {"sliding_attention": form}):
                found = real_tokens({"input_ids": ids, "attention_mask": given})
                assert torch.equal(found.view_as(mask), mask.bool())
                found = real_tokens(named_arguments((ids, given), {}))
                assert torch.equal(found.view_as(mask), mask.bool())
        found = real_tokens({"inputs_embeds": embeddings(ids), "attention_mask": mask})
        assert torch.equal(found.view_as(mask), mask.bool())
    broadcast = causal[None, None]
    assert real_tokens({"input_ids": ids, "attention_mask": broadcast}).shape == (36,)


def test_all_tokens_are_real_in_a_packed_row_or_without_a_mask(tokens):
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    packed = {"input_ids": tokens[:1], "attention_mask": ~causal, "cu_seq_lens_q": torch.tensor([0, 5, 12])}
    assert real_tokens(packed) is None
    for nothing in (None, {"full_attention": None}, {}):
        assert real_tokens({"input_ids": tokens, "attention_mask": nothing}) is None


# where sequences start


def starts(positions, real=None, bounds=None):
    positions = None if positions is None else torch.tensor(positions)
    shape = (len(real), len(real[0])) if real is not None else (1, 6)
    real = None if real is None else torch.tensor(real).bool().flatten()
    bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    found = sequence_starts(positions, bounds, shape, real)
    return None if found is None else found.int().tolist()


def test_sequences_start_at_position_0_at_a_jump_and_at_given_bounds():
    assert starts(None) is None
    assert starts([[0, 1, 2, 0, 1, 0]]) == [[1, 0, 0, 1, 0, 1]]
    assert starts([[5, 6, 7, 8, 3, 4]]) == [[0, 0, 0, 0, 1, 0]]  # the first continues in a cache
    assert starts(None, bounds=[0, 2, 5, 6, 6]) == [[0, 0, 1, 0, 0, 1]]
    assert starts([[7, 8, 9, 3, 0, 1]], bounds=[0, 2, 3, 4, 6]) == [[0, 0, 1, 1, 1, 0]]  # 9 belongs to another


def test_padding_starts_no_sequence_and_ends_none():
    left = [[0, 0, 1, 1, 1, 1]]
    for positions in ([[0, 0, 0, 1, 2, 3]], [[1, 1, 0, 1, 2, 3]]):  # as `generate` fills in positions of padding
        assert starts(positions, left) == [[0, 0, 1, 0, 0, 0]]
    assert starts([[0, 1, 2, 3, 4, 5]], left) == [[0, 0, 0, 0, 0, 0]]
    middle = [[1, 1, 0, 0, 1, 1]]
    for positions in ([[4, 5, 0, 0, 6, 7]], [[4, 5, 1, 1, 6, 7]], [[4, 5, 6, 7, 8, 9]]):
        assert starts(positions, middle) == [[0, 0, 0, 0, 0, 0]]
    assert starts([[4, 5, 0, 0, 0, 1]], middle) == [[0, 0, 0, 0, 1, 0]]
    assert starts([[0, 1, 2, 3, 0, 1]], left + middle) == [[0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0]]


# running means in a model, with padding, packing and caches


def test_the_running_mean_changes_the_logits_from_the_second_token_on(family, tokens):
    model = contextual_model(family)
    whole = uncached(model, tokens)
    put_on(model, "own", half_life=1e-3)  # the token's own value
    own = uncached(model, tokens)
    assert (whole - own)[:, 1:].abs().amax(-1).median() > 0.05
    close(whole[:, 0], own[:, 0])


@pytest.mark.parametrize(
    "family, attention, side",
    [
        ("olmoe", "eager", "left"),
        ("olmoe", "sdpa", "right"),
        ("qwen3_moe", "sdpa", "left"),
        ("gpt_oss", "eager", "left"),
        ("gpt_oss", "eager", "right"),
    ],
)
def test_a_row_of_a_padded_batch_has_the_running_means_that_it_has_alone(family, tokens, side, attention):
    model = contextual_model(family, attn_implementation=attention)
    ids, mask = padded(tokens, side)
    together = uncached(model, ids, mask)
    for row, length in enumerate(LENGTHS):
        close(together[row][mask[row] == 1], uncached(model, tokens[row : row + 1, :length])[0])


def test_padding_between_the_turns_of_a_chat_changes_nothing(family, tokens):
    contextual = contextual_model(family, **WIDE[family])
    ids = torch.cat([tokens[:, :5], torch.zeros_like(tokens[:, :2]), tokens[:, 5:]], dim=1)
    mask = torch.ones_like(ids)
    mask[:, 5:7] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    found, _ = fed(contextual, None, ids, mask, [6, 3, 1, 1, 3], position_ids=positions)
    close(found[mask == 1].view(3, 12, -1), uncached(contextual, tokens))


def test_sequences_of_a_packed_row_give_the_same_as_alone(family, tokens):
    model = contextual_model(family, **WIDE[family])
    wanted = torch.cat([uncached(model, tokens[i : i + 1, :n])[0] for i, n in enumerate(LENGTHS)])
    for form, call in packed_calls(tokens, boolean=family != "gpt_oss"):
        if family == "gpt_oss" and form == "positions":
            continue  # it does not mask packed sequences: even without a memory they attend to each other
        if family == "gpt_oss":
            call["attention_mask"] = {f"{kind}_attention": call["attention_mask"] for kind in ("full", "sliding")}
        with torch.no_grad():
            found = model(**call, use_cache=False).logits[0]
        assert (found - wanted).abs().max() < 1e-4, form


def test_position_0_starts_a_new_sequence_in_a_filled_cache(family, tokens):
    model = tiny_model(family)
    override = put_on(model)[1]
    everything, nothing = torch.ones(3, 24, dtype=torch.bool), torch.zeros(3, 24, dtype=torch.bool)
    for positions in (torch.arange(12), torch.arange(12, 24)):
        override.values, override.means = [], []
        _, cache = fed(model, None, tokens, chunks=[12])
        fed(model, cache, tokens, chunks=[5, 1, 6], position_ids=positions.expand(3, -1))
        values, means = (
            torch.cat([part.view(3, -1) for part in seen], 1) for seen in (override.values, override.means)
        )
        begins = nothing.clone()
        begins[:, 12] = positions[0] == 0
        wanted = running_mean_by_hand(values, everything, begins, HALF_LIFE)
        torch.testing.assert_close(means.double(), wanted, atol=1e-5, rtol=0)


def test_an_end_token_does_not_start_a_new_sequence(tokens):
    model = contextual_model("olmoe")
    wanted = uncached(model, tokens)
    model.config.eos_token_id = model.generation_config.eos_token_id = int(tokens[0, 4])
    model.config.pad_token_id = int(tokens[0, 6])
    assert torch.equal(uncached(model, tokens), wanted)


def test_gradient_checkpointing_recomputes_the_same_means_even_over_two_batches(family, tokens):
    model = contextual_model(family)
    batches = [padded(tokens, side) for side in ("left", "right")]
    _, wanted = gradients(model, batches, None)
    for reentrant in (False, True):
        _, found = gradients(model, batches, reentrant)
        assert set(found) == set(wanted)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-3, msg=name)
