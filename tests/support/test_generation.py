"""Padding, caches, generation and gradient checkpointing: a token's routing does not depend on any of them."""

import pytest
import torch
from transformers import StaticCache

from knnmoe_hf import attach_memory, disable_memory
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.models.attach import watch_lookups
from knnmoe_hf.models.gates import find_gates
from tests.support.caches import LENGTHS, additive, close, gradients, padded
from tests.support.models import random_memory, tiny_model


@pytest.fixture
def remembering(model):
    attach_memory(model, random_memory(model))
    return model


def forward(model, ids, mask=None, **options):
    """Logits, and the confidence of each token in each layer, (B, S, layers)."""
    seen = []
    with watch_lookups(model, lambda event: seen.append(event.confidence)), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, **options).logits
    return logits, torch.stack([confidence.reshape(ids.shape) for confidence in seen], dim=-1)


@pytest.mark.parametrize(
    "family, attention, side",
    [
        ("olmoe", "eager", "right"),
        ("olmoe", "sdpa", "left"),
        ("qwen3_moe", "eager", "left"),
        ("qwen3_moe", "sdpa", "right"),
        ("gpt_oss", "eager", "left"),
        ("gpt_oss", "eager", "right"),
    ],
)
def test_a_padded_row_is_routed_as_it_is_alone_and_padding_is_never_looked_up(family, tokens, side, attention):
    model = tiny_model(family, attn_implementation=attention)
    attach_memory(model, random_memory(model))
    ids, mask = padded(tokens, side)
    logits, confidence = forward(model, ids, mask)
    assert not confidence[mask == 0].any() and confidence[mask == 1].all()
    for row, length in enumerate(LENGTHS):
        alone, confidence_alone = forward(model, tokens[row : row + 1, :length])
        close(logits[row][mask[row] == 1], alone[0], atol=2e-4)
        close(confidence[row][mask[row] == 1], confidence_alone[0], atol=2e-4)


def test_the_mask_decides_what_is_padding_and_not_the_token_ids(family):
    model = tiny_model(family, pad_token_id=7)
    attach_memory(model, random_memory(model))
    ids = torch.tensor([[3, 7, 7, 9, 7]])
    for mask in (None, torch.ones_like(ids), torch.ones_like(ids).bool()):
        assert forward(model, ids, mask)[1].all()
    mask = torch.tensor([[1, 1, 0, 1, 0]])  # in the middle too
    assert torch.equal(forward(model, ids, mask)[1].bool().all(-1), mask.bool())


def test_a_model_given_a_mask_of_four_dimensions_routes_as_with_one_of_two(family, tokens):
    model = tiny_model(family, attn_implementation="eager", sliding_window=64)
    attach_memory(model, random_memory(model))
    ids, mask = padded(tokens, "right")
    square = additive((torch.ones(12, 12, dtype=torch.bool).tril() & mask[:, None, :].bool())[:, None])
    given = {"full_attention": square, "sliding_attention": square} if family == "gpt_oss" else square
    wanted, found = forward(model, ids, mask), forward(model, ids, given)
    close(found[0][mask == 1], wanted[0][mask == 1], atol=2e-4)
    close(found[1], wanted[1], atol=2e-4)


@pytest.mark.parametrize("static, chunks", [(False, [9, 1, 1, 1]), (True, [5, 7])])
def test_a_cache_gives_the_routing_of_the_whole_sequence(remembering, tokens, chunks, static):
    ids, mask = padded(tokens, "left")
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = forward(remembering, ids, mask, position_ids=positions)
    cache = StaticCache(config=remembering.config, max_cache_len=16) if static else None
    parts, start = [], 0
    for size in chunks:
        new = slice(start, start + size)
        with torch.no_grad():
            seen = []
            with watch_lookups(remembering, lambda event, s=seen: s.append(event.confidence)):
                out = remembering(
                    input_ids=ids[:, new],
                    attention_mask=torch.nn.functional.pad(mask[:, : new.stop], (0, 4 if static else 0), value=0),
                    position_ids=positions[:, new],
                    past_key_values=cache,
                    use_cache=True,
                )
        cache, start = out.past_key_values, new.stop
        parts.append((out.logits, torch.stack([c.reshape(len(ids), -1) for c in seen], dim=-1)))
    close(torch.cat([part[0] for part in parts], 1)[mask == 1], whole[0][mask == 1], atol=2e-4)
    close(torch.cat([part[1] for part in parts], 1), whole[1], atol=2e-4)


def generate(model, ids, mask, **options):
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
            disable_compile=True,
            **options,
        )[:, ids.shape[1] :]


WAYS = {
    "no cache": dict(use_cache=False),
    "static cache": dict(cache_implementation="static"),
    "chunked prefill": dict(prefill_chunk_size=4),
}


def test_generation_of_a_padded_batch_is_that_of_each_sequence_alone(remembering, tokens):
    ids, mask = padded(tokens, "left")
    together = generate(remembering, ids, mask)
    with disable_memory(remembering):
        assert not torch.equal(generate(remembering, ids, mask), together)
    for row, length in enumerate(LENGTHS):
        alone = tokens[row : row + 1, :length]
        assert torch.equal(generate(remembering, alone, torch.ones_like(alone))[0], together[row])
    for way, options in WAYS.items():
        assert torch.equal(generate(remembering, ids, mask, **options), together), way


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_is_never_looked_up_while_generating(remembering, tokens, cache):
    ids, mask = padded(tokens, "left")
    seen = []
    with watch_lookups(remembering, lambda event: seen.append(event.confidence)):
        generate(remembering, ids, mask, **({} if cache == "dynamic" else WAYS["static cache"]))
    assert len(seen) == 2 * 10
    for confidence in seen[:2]:
        assert torch.equal(confidence.reshape(ids.shape) > 0, mask == 1)
    assert all(confidence.all() for confidence in seen[2:])


def test_beam_search_of_a_padded_batch_is_that_of_each_sequence_alone(remembering, tokens):
    ids, mask = padded(tokens, "left")
    together = generate(remembering, ids, mask, num_beams=3)
    for row, length in enumerate(LENGTHS):
        alone = tokens[row : row + 1, :length]
        assert torch.equal(generate(remembering, alone, torch.ones_like(alone), num_beams=3)[0], together[row])
    assert torch.equal(generate(remembering, ids, mask, num_beams=3, cache_implementation="static"), together)


def test_a_static_cache_with_a_sliding_window_in_every_layer_generates_as_a_dynamic_one(tokens):
    model = tiny_model("qwen3_moe", use_sliding_window=True, sliding_window=6, max_window_layers=0)
    attach_memory(model, random_memory(model))
    ids, mask = padded(tokens, "left")
    assert torch.equal(generate(model, ids, mask, cache_implementation="static"), generate(model, ids, mask))


@pytest.mark.parametrize(
    "family, space, width, reentrant",
    [
        ("olmoe", "logits", None, False),
        ("qwen3_moe", "assignment", "union", True),
        ("gpt_oss", "logits", None, True),
        ("gpt_oss", "assignment", "union", False),
    ],
)
def test_gradient_checkpointing_routes_alike_even_over_two_batches(family, tokens, space, width, reentrant):
    model = tiny_model(family)
    attach_memory(model, random_memory(model, value_space=space, routing_width=width))
    # what is padding differs, and both are recomputed after the second forward
    batches = [padded(tokens, side) for side in ("left", "right")]
    loss, wanted = gradients(model, batches, None)
    again, found = gradients(model, batches, reentrant)
    close(again, loss, atol=2e-4)
    assert set(found) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-3, msg=name)


def test_a_gate_called_alone_is_refused_and_not_taken_for_part_of_the_batch_before(remembering, tokens):
    gate, x = find_gates(remembering)[0], torch.randn(36, 32, generator=torch.Generator().manual_seed(0))
    forward(remembering, *padded(tokens, "left"))
    with pytest.raises(UnsupportedModelError, match=r"tokens of the model's call did not arrive.*disable_memory"):
        gate.module(x)
    with disable_memory(remembering):
        gate.module(x)
