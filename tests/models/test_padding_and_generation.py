"""A token's routing does not depend on what it is batched, padded, cached or recomputed with."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, StaticCache

from knnmoe_hf import attach_memory, disable_memory
from knnmoe_hf.models.attach import watch_lookups
from knnmoe_hf.models.calls import named_arguments, real_tokens
from knnmoe_hf.models.gates import find_gates
from tests.conftest import FAMILIES, random_memory, tiny_model

LENGTHS = (12, 7, 4)


@pytest.fixture
def remembering(model):
    attach_memory(model, random_memory(model))
    return model


def padded(tokens, side: str, pad_id: int = 0):
    """The first `LENGTHS` tokens of each row, padded, and their mask."""
    width = max(LENGTHS)
    ids, mask = torch.full((len(LENGTHS), width), pad_id), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = tokens[row, :length], 1
    return ids, mask


def forward(model, ids, mask=None, **options):
    """Logits, and the confidence of each token in each layer, (B, S, layers)."""
    seen = []
    with watch_lookups(model, lambda layer, neighbors, confidence: seen.append(confidence)), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, **options).logits
    return logits, torch.stack([confidence.reshape(ids.shape) for confidence in seen], dim=-1)


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "family, attention", [*((family, "eager") for family in FAMILIES), ("olmoe", "sdpa"), ("qwen3_moe", "sdpa")]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_routed_as_it_is_alone_and_padding_never_queries(family, tokens, side, attention):
    model = tiny_model(family, attn_implementation=attention)
    attach_memory(model, random_memory(model))
    ids, mask = padded(tokens, side)
    logits, confidence = forward(model, ids, mask)
    assert not confidence[mask == 0].any() and confidence[mask == 1].all()
    for row, length in enumerate(LENGTHS):
        alone, confidence_alone = forward(model, tokens[row : row + 1, :length])
        close(logits[row][mask[row] == 1], alone[0])
        close(confidence[row][mask[row] == 1], confidence_alone[0])


def test_what_is_padding_is_said_by_the_mask_and_not_by_token_ids(family):
    model = tiny_model(family, pad_token_id=7)
    attach_memory(model, random_memory(model))
    ids = torch.tensor([[3, 7, 7, 9, 7]])
    for mask in (None, torch.ones_like(ids), torch.ones_like(ids).bool()):
        assert forward(model, ids, mask)[1].all()
    mask = torch.tensor([[1, 1, 0, 1, 0]])  # in the middle too
    assert torch.equal(forward(model, ids, mask)[1].bool().all(-1), mask.bool())


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def test_a_mask_of_four_dimensions_says_what_one_of_two_says(model, tokens):
    for side in ("left", "right"):
        ids, mask = padded(tokens, side)
        causal = torch.ones(12, 12, dtype=torch.bool).tril()
        square = (causal & mask[:, None, :].bool())[:, None]  # (B, 1, S, S)
        for form in (square, additive(square)):
            for given in (form, {"full_attention": form, "sliding_attention": form}, {"sliding_attention": form}):
                found = real_tokens({"input_ids": ids, "attention_mask": given})
                assert torch.equal(found.view_as(mask), mask.bool())
                found = real_tokens(named_arguments((ids, given), {}))
                assert torch.equal(found.view_as(mask), mask.bool())
        embedded = model.get_input_embeddings()(ids)
        found = real_tokens({"inputs_embeds": embedded, "attention_mask": mask})
        assert torch.equal(found.view_as(mask), mask.bool())
    broadcast = causal[None, None]
    assert real_tokens({"input_ids": ids, "attention_mask": broadcast}).shape == (36,)
    packed = {"input_ids": ids[:1], "attention_mask": ~broadcast, "cu_seq_lens_q": torch.tensor([0, 5, 12])}
    assert real_tokens(packed) is None
    for nothing in (None, {"full_attention": None}, {}):
        assert real_tokens({"input_ids": ids, "attention_mask": nothing}) is None


def test_a_model_given_a_mask_of_four_dimensions_routes_as_with_one_of_two(family, tokens):
    model = tiny_model(family, attn_implementation="eager", sliding_window=64)
    attach_memory(model, random_memory(model))
    ids, mask = padded(tokens, "right")
    square = additive((torch.ones(12, 12, dtype=torch.bool).tril() & mask[:, None, :].bool())[:, None])
    given = {"full_attention": square, "sliding_attention": square} if family == "gpt_oss" else square
    wanted, found = forward(model, ids, mask), forward(model, ids, given)
    close(found[0][mask == 1], wanted[0][mask == 1])
    close(found[1], wanted[1])


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 7], [9, 1, 1, 1]])
@pytest.mark.parametrize("static", [False, True])
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
            with watch_lookups(remembering, lambda layer, near, confidence, s=seen: s.append(confidence)):
                out = remembering(
                    input_ids=ids[:, new],
                    attention_mask=torch.nn.functional.pad(mask[:, : new.stop], (0, 4 if static else 0), value=0),
                    position_ids=positions[:, new],
                    past_key_values=cache,
                    use_cache=True,
                )
        cache, start = out.past_key_values, new.stop
        parts.append((out.logits, torch.stack([c.reshape(len(ids), -1) for c in seen], dim=-1)))
    close(torch.cat([part[0] for part in parts], 1)[mask == 1], whole[0][mask == 1])
    close(torch.cat([part[1] for part in parts], 1), whole[1])


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


MANNERS = {
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
    for manner, options in MANNERS.items():
        assert torch.equal(generate(remembering, ids, mask, **options), together), manner


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_never_queries_while_generating(remembering, tokens, cache):
    ids, mask = padded(tokens, "left")
    seen = []
    with watch_lookups(remembering, lambda layer, neighbors, confidence: seen.append(confidence)):
        generate(remembering, ids, mask, **({} if cache == "dynamic" else MANNERS["static cache"]))
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


def test_a_window_that_slides_in_every_layer_is_no_hindrance_to_a_static_cache(tokens):
    model = tiny_model("qwen3_moe", use_sliding_window=True, sliding_window=6, max_window_layers=0)
    attach_memory(model, random_memory(model))
    ids, mask = padded(tokens, "left")
    assert torch.equal(generate(model, ids, mask, cache_implementation="static"), generate(model, ids, mask))


def test_continuous_batching_generates_what_each_prompt_alone_does(remembering, tokens):
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=95)
    prompts = [tokens[row, :length] for row, length in enumerate(LENGTHS)]
    engine = ContinuousBatchingConfig(
        num_blocks=64, max_batch_tokens=64, use_cuda_graph=False
    )  # else it takes all RAM
    found = remembering.generate_batch(
        [p.tolist() for p in prompts], generation_config=config, continuous_batching_config=engine
    )
    for prompt, answer in zip(prompts, found.values()):
        alone = remembering.generate(prompt[None], generation_config=config)[0, len(prompt) :]
        assert answer.generated_tokens == alone.tolist()


def gradients(model, batches, reentrant: bool | None):
    """Loss of all batches and the gradients from one backward pass, with gradient checkpointing unless None."""
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    model.train()
    model.zero_grad()
    loss = sum(model(input_ids=ids, attention_mask=mask, labels=labels).loss for ids, mask, labels in batches)
    loss.backward()
    model.eval()
    model.activation_checkpointing_disable()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("space, width", [("logits", None), ("assignment", "union")])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_routes_alike_even_over_two_batches(family, tokens, space, width, reentrant):
    model = tiny_model(family)
    attach_memory(model, random_memory(model, value_space=space, routing_width=width))
    batches = []
    for side in ("left", "right"):  # what is padding differs, and both are recomputed after the second forward
        ids, mask = padded(tokens, side)
        batches.append((ids, mask, ids.masked_fill(mask == 0, -100)))
    loss, wanted = gradients(model, batches, None)
    again, found = gradients(model, batches, reentrant)
    close(again, loss)
    assert set(found) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-3, msg=name)


def test_a_gate_that_is_called_after_a_padded_batch_knows_nothing_of_its_padding(remembering, tokens):
    gate = find_gates(remembering)[0]
    x = torch.randn(36, 32, generator=torch.Generator().manual_seed(0))
    fresh = gate.module(x)[0]
    forward(remembering, *padded(tokens, "left"))
    assert torch.equal(gate.module(x)[0], fresh)
    gate.module(x[:5])
