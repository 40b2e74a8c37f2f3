"""`trace_routing`: what it records is what the memory did, and it changes nothing."""

import copy
import logging

import pytest
import torch
from transformers import DynamicCache

from knnmoe_hf import attach_memory, attach_override, disable_memory, trace_routing
from knnmoe_hf.evaluation.routing import record_routing
from knnmoe_hf.evaluation.routing_measures import jensen_shannon
from knnmoe_hf.memory.levels import at_level
from tests.memory.helpers import full_memory, tiny_tokenizer
from tests.support.models import random_memory, tiny_model


@pytest.fixture
def traced(model):
    """A model with a memory that has confidences between 0 and 1."""
    attach_memory(model, random_memory(model))
    return model.eval()


def run(model, tokens, **call):
    with torch.no_grad():
        return model(input_ids=tokens, **call).logits


def test_tracing_changes_no_bit_of_a_forward_or_a_generation(traced, tokens):
    settings = dict(max_new_tokens=6, do_sample=True, output_logits=True, return_dict_in_generate=True)
    before = run(traced, tokens)
    torch.manual_seed(0)
    generated = traced.generate(tokens, **settings)
    with trace_routing(traced):
        assert torch.equal(run(traced, tokens), before)
        torch.manual_seed(0)
        again = traced.generate(tokens, **settings)
    assert torch.equal(again.sequences, generated.sequences)
    assert all(map(torch.equal, again.logits, generated.logits))
    assert torch.equal(run(traced, tokens), before)


@pytest.mark.filterwarnings("error:Dynamo does not know")
def test_a_compiled_model_is_traced_as_the_plain_one_without_a_warning(tokens):
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model))
    with trace_routing(model) as plain:
        run(model, tokens)
    compiled = torch.compile(model, backend="eager")
    with trace_routing(compiled) as trace:
        run(compiled, tokens)
    assert len(trace) == len(plain) and torch.equal(trace.layers[0].rows, plain.layers[0].rows)
    torch._dynamo.reset()


def test_random_numbers_of_the_caller_stay_in_their_order(traced, tokens):
    traced.train()
    torch.manual_seed(0)
    with trace_routing(traced):
        run(traced, tokens)
    assert traced.training and torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_experts_before_and_after_are_what_the_blocks_get_with_and_without_the_memory(traced, tokens):
    with disable_memory(traced), record_routing(traced) as off:
        run(traced, tokens)
    with record_routing(traced) as on, trace_routing(traced, log_probs=False) as trace:
        run(traced, tokens)
    first = min(trace.layers)  # whose input no memory has changed
    for layer, found in trace.layers.items():
        assert torch.equal(found.mixed_experts, on.routes[layer].ids)
        assert torch.equal(found.mixed_weights, on.routes[layer].weights)
    assert torch.equal(trace.layers[first].own_experts, off.routes[first].ids)
    assert torch.equal(trace.layers[first].own_weights, off.routes[first].weights)


def test_neighbours_confidence_and_divergence_are_those_of_the_formulas(tokens):
    model = tiny_model("olmoe").eval()
    memory = random_memory(model)
    attach_memory(model, memory)
    inputs = {}
    gates = {layer: model.model.layers[layer].mlp.gate for layer in memory.layers}
    handles = [
        gate.register_forward_hook(lambda _, given, out, layer=layer: inputs.update({layer: given[0].reshape(-1, 32)}))
        for layer, gate in gates.items()
    ]
    with trace_routing(model, log_probs=False) as trace:
        run(model, tokens)
    for handle in handles:
        handle.remove()
    config = memory.config
    for layer, found in trace.layers.items():
        rows = memory.layers[layer]
        far = torch.cdist(inputs[layer], rows.decoded_keys, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = far.topk(config.num_neighbors, largest=False)
        assert torch.equal(found.rows.long(), nearest.indices)
        torch.testing.assert_close(found.distances, nearest.values, rtol=1e-4, atol=1e-5)
        weights = torch.softmax(-nearest.values / (config.temperature * rows.scale), -1)
        torch.testing.assert_close(found.weights, weights, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            found.confidence, torch.exp(-config.gamma * nearest.values / rows.scale).mean(-1), rtol=1e-3, atol=1e-5
        )
        before, after = (
            torch.zeros(len(ids), 9).scatter_add(1, ids.long() % 9, weights)[:, :8]
            for ids, weights in (
                (found.own_experts, found.own_weights),
                (found.mixed_experts, found.mixed_weights),
            )
        )
        torch.testing.assert_close(found.divergence, jensen_shannon(before, after))
        assert found.divergence.max() > 0


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_a_generation_is_one_sequence_for_each_row_also_with_padding(traced, tokens, cache):
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    call = dict(use_cache=False) if cache is None else dict(cache_implementation=cache)
    with trace_routing(traced) as trace:
        found = traced.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False, **call)
    whole = [row[5 * (place == 1) : -1].tolist() for place, row in enumerate(found)]  # the last token is not an input
    sequences = [trace.token_ids[sequence].tolist() for sequence in trace.sequences()]
    for sequence in whole:
        assert sequence in sequences
    if cache is not None:
        assert len(sequences) == 3 and len(trace) == sum(map(len, whole))


def test_beams_are_followed_through_a_reordered_cache(traced, tokens):
    with trace_routing(traced) as trace:
        found = traced.generate(tokens[:1], max_new_tokens=6, num_beams=3, num_return_sequences=3, do_sample=False)
    sequences = [trace.token_ids[sequence].tolist() for sequence in trace.sequences()]
    for beam in found:
        beam = beam.tolist()
        assert any(one[: len(beam) - 1] == beam[:-1] for one in sequences)


def test_calls_on_one_cache_are_one_sequence_and_copies_of_a_cache_branch(traced, tokens):
    with torch.no_grad(), trace_routing(traced) as trace:
        cache = traced(input_ids=tokens[:, :4], use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        traced(input_ids=tokens[:, 4:7], past_key_values=cache)
        traced(input_ids=tokens[:, 8:9], past_key_values=other)
    sequences = sorted(trace.token_ids[sequence].tolist() for sequence in trace.sequences())
    expected = [row[:7] for row in tokens.tolist()] + [row[:4] + row[8:9] for row in tokens.tolist()]
    assert sequences == sorted(expected)


def test_a_cache_that_was_cropped_goes_on_from_what_is_left(traced, tokens):
    cache = DynamicCache()  # without the model's configuration: sliding windows cannot be cropped
    with torch.no_grad(), trace_routing(traced) as trace:
        traced(input_ids=tokens, past_key_values=cache)
        cache.crop(-6)
        traced(input_ids=tokens[:, :2], past_key_values=cache)
    sequences = [trace.token_ids[sequence].tolist() for sequence in trace.sequences()]
    assert all(row[:6] + row[:2] in sequences for row in tokens.tolist())


def test_a_token_goes_on_from_the_last_real_one_before_padding(traced, tokens):
    mask = torch.ones_like(tokens)
    mask[:, 3:5] = 0
    with trace_routing(traced, log_probs=False) as trace:
        run(traced, tokens, attention_mask=mask)
    sequences = [trace.token_ids[sequence].tolist() for sequence in trace.sequences()]
    assert sequences == [row[:3] + row[5:] for row in tokens.tolist()]


def test_what_began_before_the_trace_has_no_sequence(traced, tokens):
    with torch.no_grad():
        cache = traced(input_ids=tokens, use_cache=True).past_key_values
        with trace_routing(traced) as trace:
            traced(input_ids=tokens[:, :2], past_key_values=cache)
    assert len(trace) == 6 and trace.previous[0] == -2 and trace.sequences() == []
    assert trace.gain.isnan().all() and not trace.layers[0].confidence.isnan().any()


def test_log_probabilities_are_those_of_the_model_with_and_without_the_memory(traced, tokens):
    def expected():
        chosen = run(traced, tokens)[:, :-1].log_softmax(-1)
        return chosen.gather(-1, tokens[:, 1:, None]).flatten()

    with trace_routing(traced) as trace:
        run(traced, tokens)
    inner = trace.previous >= 0
    torch.testing.assert_close(trace.log_prob[inner], expected(), rtol=1e-4, atol=1e-5)
    with disable_memory(traced):
        torch.testing.assert_close(trace.base_log_prob[inner], expected(), rtol=1e-4, atol=1e-5)
    assert trace.gain[inner].abs().max() > 1e-4 and trace.gain[~inner].isnan().all()


def test_next_tokens_that_were_recalled_and_their_share(model, tokens):
    memory = random_memory(model, recall="both")
    attach_memory(model, memory)
    with trace_routing(model) as trace:
        run(model, tokens)
    found, last = trace.recalled, trace.layers[max(trace.layers)]
    ids = memory.next_tokens[last.rows[5].long()]
    assert set(ids.tolist()) <= set(found.ids[5].tolist()) or len(memory) > 16
    assert (found.weight > 0).any() and (found.weight < 1).all()
    assert (found.probabilities.sum(-1) <= 1 + 1e-5).all() and (found.probabilities.diff(dim=1) <= 0).all()
    for row in found.ids.tolist():
        kept = [id for id in row if id >= 0]
        assert len(kept) == len(set(kept))


def test_memory_is_bounded_and_what_was_left_out_is_said(traced, tokens, caplog):
    with caplog.at_level(logging.WARNING), trace_routing(traced, max_tokens=14, log_probs=False) as trace:
        for _ in range(3):
            run(traced, tokens)
    assert (len(trace), trace.seen) == (14, 108) and len(trace.layers[0].rows) == 14
    assert "the first 14 of 108 tokens" in caplog.text and trace.gain is None
    assert trace.token_ids.tolist() == tokens.flatten()[:14].tolist()


def test_calls_without_the_memory_are_tokens_without_lookups(traced, tokens):
    with trace_routing(traced) as trace:
        run(traced, tokens)
        with disable_memory(traced):
            run(traced, tokens)
    assert len(trace) == 72
    assert trace.layers[0].confidence.isnan().sum() == 36 and (trace.layers[0].rows[36:] == -1).all()
    assert trace.neighbors(40, 0) == []


def test_a_dataset_and_a_frame_have_a_line_for_each_token_and_layer(traced, tokens):
    with trace_routing(traced) as trace:
        run(traced, tokens)
    dataset, frame = trace.to_dataset(), trace.to_pandas()
    assert len(dataset) == len(frame) == len(trace) * len(trace.layers)
    line, found = dataset[7], trace.layers[sorted(trace.layers)[7 % len(trace.layers)]]
    token = line["token"]
    assert line["rows"] == found.rows[token].tolist()
    assert line["confidence"] == pytest.approx(found.confidence[token].item())
    assert line["gain"] == pytest.approx(trace.gain[token].item())
    assert frame["layer"].tolist()[:2] == sorted(trace.layers)[:2]
    assert dataset[0]["log_prob"] is None


@pytest.mark.parametrize("level, words", [("text", "is known"), ("ids", "'ids'"), ("none", "'none'")])
def test_neighbours_have_the_reference_text_that_the_memory_has(tokens, level, words):
    model = tiny_model("olmoe")
    memory = at_level(full_memory(model, tokenizer=tiny_tokenizer()), level)
    attach_memory(model, memory)
    with trace_routing(model) as trace:
        run(model, tokens)
    assert words in trace.provenance()
    neighbor = trace.neighbors(3, 0)[0]
    reference, row = neighbor.reference, neighbor.reference.row
    assert row == trace.layers[0].rows[3, 0]
    assert neighbor.weight == pytest.approx(trace.layers[0].weights[3, 0].item())
    if level == "none":
        assert (reference.example, reference.position, reference.token) == (None, None, None)
        return
    source = memory.provenance
    assert (reference.example, reference.position) == (source.example_ids[row], source.positions[row])
    if level == "ids":
        assert reference.token is None and reference.token_id is None
        return
    ids = source.tokens()[reference.example]
    assert reference.token_id == ids[reference.position]
    assert reference.token == memory.tokenizer.decode([reference.token_id])
    assert reference.before == memory.tokenizer.decode(ids[: reference.position][-12:])


def test_what_cannot_be_traced_is_said(tokens):
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match="no memory is attached"), trace_routing(model):
        pass
    attach_override(model, {0: lambda x, output, tokens: None})
    with pytest.raises(ValueError, match="not a memory"), trace_routing(model):
        pass
    with pytest.raises(ValueError, match="max_tokens=0"), trace_routing(model, max_tokens=0):
        pass


def test_no_hook_stays_after_an_error(traced, tokens):
    hooks = [len(module._forward_hooks) for module in traced.modules()]
    with pytest.raises(ZeroDivisionError), trace_routing(traced):
        run(traced, tokens)
        raise ZeroDivisionError
    assert [len(module._forward_hooks) for module in traced.modules()] == hooks
