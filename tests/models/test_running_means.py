"""Running means in a model, with padding, packing, caches, trees and checkpoints: each token's are of its own past."""

import pytest
import torch
from transformers import DynamicCache

from knnmoe_hf import attach_memory, disable_memory
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
from tests.support.models import random_memory, tiny_model
from tests.support.running_means import HALF_LIFE, contextual_model, put_on
from tests.support.stats import with_stats
from tests.support.trees import PAD, attended, depths, each_alone, random_parents


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


@pytest.mark.parametrize("confidence", ["context", "calibrated"])
@pytest.mark.parametrize("seed", range(3))
def test_a_memory_routes_each_token_of_a_tree_by_its_own_past(confidence, seed):
    model = tiny_model("olmoe", attn_implementation="eager")
    memory = random_memory(model, confidence=confidence, half_life=3.0, context_threshold=0.3, context_width=0.3)
    if confidence == "calibrated":
        memory = with_stats(memory, reference_mean=0.8, threshold=0.3, width=0.3)
    attach_memory(model, memory)
    parents = random_parents(2, 14, seed)
    ids = torch.randint(96, (2, 14), generator=torch.Generator().manual_seed(seed))
    wanted, mask, positions = each_alone(model, ids, parents), attended(parents), depths(parents)
    cache, found = DynamicCache(), []
    for new in (slice(0, 6), slice(6, 7), slice(7, 14)):
        with torch.no_grad():
            given = additive(mask[:, :, new, : new.stop])
            found.append(model(ids[:, new], given, position_ids=positions[:, new], past_key_values=cache).logits)
    real = parents != PAD
    close(torch.cat(found, 1)[real], wanted[real], atol=2e-4)
    with disable_memory(model):
        assert not torch.allclose(each_alone(model, ids, parents)[real], wanted[real], atol=0.05)
