"""Recalled next tokens reach whatever reads logits, change nothing where the memory is closed, and are never lost."""

import contextlib
import threading
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, pipeline

from knnmoe_hf import attach_memory, detach_memory, disable_memory, watch_lookups
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.models.attach import attach_prepared, prepare
from knnmoe_hf.models.hooks import RoutingHooks
from tests.models.recalling import MIXED, mixed_by_hand
from tests.support.attaching import hooks_of
from tests.support.caches import close, logits_of, padded, uncached
from tests.support.families import FAMILIES, family_model
from tests.support.models import random_memory, tiny_model
from tests.support.stats import with_fit
from tests.support.tokenizers import byte_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_mixed_distribution_and_is_itself_where_the_memory_is_closed(family):
    tokens = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(2))
    model = family_model(family)
    base = uncached(model, tokens)
    memory = random_memory(model, **MIXED)
    attach_memory(model, memory)
    mixed = uncached(model, tokens)
    close(mixed.log_softmax(-1), mixed_by_hand(model, memory, tokens))
    assert (mixed - base).abs().max() > 1
    close(uncached(model, tokens, logits_to_keep=2), mixed[:, -2:])
    with disable_memory(model):
        assert torch.equal(uncached(model, tokens), base)
    closed = replace(memory)
    closed.config.gamma = 1e9  # every confidence is 0
    attach_memory(model, closed, "closed")
    assert torch.equal(uncached(model, tokens), base)
    detach_memory(model)
    assert torch.equal(uncached(model, tokens), base) and not hooks_of(model)


def test_next_tokens_alone_leave_the_routing_as_it_is(olmoe, tokens):
    memory = random_memory(olmoe, **(MIXED | dict(recall="next_tokens")))
    attach_memory(olmoe, memory)
    close(uncached(olmoe, tokens).log_softmax(-1), mixed_by_hand(olmoe, memory, tokens))
    with torch.no_grad():
        on = olmoe.model(tokens, output_router_logits=True)
        with disable_memory(olmoe):
            off = olmoe.model(tokens, output_router_logits=True)
    assert torch.equal(on.last_hidden_state, off.last_hidden_state)
    assert all(torch.equal(*pair) for pair in zip(on.router_logits, off.router_logits))


def test_what_a_calibration_has_fitted_decides_what_recalled_tokens_count(olmoe, tokens):
    memory = with_fit(random_memory(olmoe, recall="next_tokens", confidence="calibrated", context_threshold=0.3))
    attach_memory(olmoe, memory)
    with disable_memory(olmoe):
        own = uncached(olmoe, tokens).flatten(0, 1).softmax(-1)
    seen = []
    with watch_lookups(olmoe, seen.append):
        found = uncached(olmoe, tokens).flatten(0, 1).log_softmax(-1)
    event, scale = seen[-1], memory.layers[1].scale
    distances, evidence = event.voters.distances / scale, event.tokens.layer_evidence[1]
    votes = torch.softmax(-distances / 0.5, dim=-1)
    recalled = torch.zeros_like(own).scatter_add(1, memory.next_tokens[event.voters.rows].long(), votes)
    entropy = -torch.xlogy(recalled, recalled).sum(-1)
    similar = torch.exp(-0.3 * event.neighbors.distances / scale).mean(-1)
    confidence = similar * torch.sigmoid((evidence.evidence / evidence.weight - 0.7) / 0.3)
    sure = confidence * torch.exp(-(entropy + distances[:, 0]) / 2)
    weight = (0.6 * sure / (0.6 * sure + 0.4 * (1 - sure)))[:, None]
    close(found, ((1 - weight) * own + weight * recalled).log())
    assert weight.min() > 0.01


KEPT = {
    "none left out": (0, slice(None)),
    "more than there are": (99, slice(None)),
    "the last": (1, slice(-1, None)),
    "indices": (torch.tensor([5, 2, 2]), [5, 2, 2]),
    "indices from the end": (torch.tensor([-1, 0]), [-1, 0]),
}


@pytest.mark.parametrize("kept", KEPT)
def test_logits_of_some_positions_are_those_of_all(remembering, tokens, kept):
    keep, places = KEPT[kept]
    close(uncached(remembering, tokens, logits_to_keep=keep), uncached(remembering, tokens)[:, places])


def test_positions_of_each_row_and_those_given_by_position_are_understood(remembering, tokens):
    whole = uncached(remembering, tokens)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    close(uncached(remembering, tokens, logits_to_keep=mask), whole[mask])
    places = torch.tensor([[1, 2], [3, 4], [0, 11]])
    wanted = whole.gather(1, places[..., None].expand(-1, -1, whole.shape[-1]))
    close(uncached(remembering, tokens, logits_to_keep=places), wanted)
    with torch.no_grad():
        given = remembering(tokens, None, None, None, None, None, False, None, 2)
    close(given.logits, whole[:, -2:])


def test_the_loss_inside_the_model_is_that_of_the_mixed_distribution(remembering, tokens):
    labels = tokens.masked_fill(tokens % 5 == 0, -100)
    with torch.no_grad():
        out = remembering(input_ids=tokens, labels=labels)
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted)
    with disable_memory(remembering), torch.no_grad():
        assert abs(remembering(input_ids=tokens, labels=labels).loss - wanted) > 0.01


def test_an_adapter_beside_a_memory_gets_the_gradient_of_the_mixed_loss(olmoe, tokens):
    memory = random_memory(olmoe, **(MIXED | dict(recall="next_tokens")))
    torch.manual_seed(0)
    adapted = get_peft_model(olmoe, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    attach_memory(adapted, memory)
    weights = [one for one in adapted.parameters() if one.requires_grad]
    loss = adapted(input_ids=tokens, labels=tokens, use_cache=False).loss
    found = torch.autograd.grad(loss, weights)
    seen = []
    with watch_lookups(adapted, seen.append):
        logits_of(adapted, tokens, use_cache=False)
    with disable_memory(adapted):
        own = adapted(input_ids=tokens, use_cache=False).logits.flatten(0, 1).softmax(-1)
    votes = torch.softmax(-seen[-1].voters.distances / memory.layers[1].scale, dim=-1)
    recalled = torch.zeros_like(own).scatter_add(1, memory.next_tokens[seen[-1].voters.rows].long(), votes)
    weight = 0.5 * seen[-1].confidence[:, None]
    logs = ((1 - weight) * own + weight * recalled).log().view(*tokens.shape, -1)
    wanted = F.nll_loss(logs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted)
    for one, other in zip(found, torch.autograd.grad(wanted, weights)):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_sampling_with_a_seed_and_early_exit_see_the_mixed_logits(remembering, tokens):
    prompt = tokens[:1, :6]
    common = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=8, pad_token_id=0)
    torch.manual_seed(3)
    sampled = remembering.generate(
        prompt, do_sample=True, top_k=0, output_logits=True, return_dict_in_generate=True, **common
    )
    wanted = uncached(remembering, sampled.sequences[:, :-1])[0, 5:]
    close(torch.cat(sampled.logits), wanted)
    greedy = remembering.generate(prompt, do_sample=False, **common)
    assert torch.equal(remembering.generate(prompt, do_sample=False, assistant_early_exit=1, **common), greedy)


def test_trainer_and_pipeline_see_the_mixed_logits(tmp_path):
    model, tokenizer = tiny_model("olmoe", vocab_size=257), byte_tokenizer()
    attach_memory(model, random_memory(model, **MIXED))
    texts = ["The court", "A verdict", "The judge"]
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]
    arguments = TrainingArguments(tmp_path, report_to=[], per_device_eval_batch_size=3, use_cpu=True)
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    batch = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        assert found == pytest.approx(float(model(input_ids=batch, labels=batch).loss), rel=1e-4)
    options = dict(do_sample=False, max_new_tokens=5, pad_token_id=0)
    ids = model.generate(batch[:1], attention_mask=torch.ones_like(batch[:1]), **options)
    (answer,) = pipeline("text-generation", model=model, tokenizer=tokenizer)(texts[0], **options)
    assert answer["generated_text"] == tokenizer.decode(ids[0])


def test_padding_recalls_nothing(remembering, tokens):
    ids, mask = padded(tokens, "left")
    seen = []
    with watch_lookups(remembering, seen.append):
        uncached(remembering, ids, mask)
    assert torch.equal(seen[-1].confidence.view(ids.shape) > 0, mask == 1)


def test_a_vocabulary_padded_before_attaching_is_mixed_over_all_its_entries(olmoe, tokens):
    memory = random_memory(olmoe, **MIXED)
    olmoe.resize_token_embeddings(pad_to_multiple_of=64)
    with torch.no_grad():
        olmoe.lm_head.weight[96:] = 0
    attach_memory(olmoe, replace(memory))
    logits = uncached(olmoe, tokens)
    assert logits.shape[-1] == 128
    with disable_memory(olmoe):
        assert torch.equal(uncached(olmoe, tokens)[..., 96:], logits[..., 96:])
    torch.testing.assert_close(
        uncached(olmoe, tokens).log_softmax(-1), mixed_by_hand(olmoe, memory, tokens), atol=1e-4, rtol=1e-4
    )


def test_a_prepared_memory_may_be_given_another_recall(olmoe, tokens):
    prepared = prepare(olmoe, random_memory(olmoe, **MIXED))
    routing = prepared.with_options(replace(prepared.options, recall="routing"))
    found = {}
    for name, one in {"both": prepared, "routing": routing, "again": routing.with_options(prepared.options)}.items():
        attach_prepared(olmoe, one, name)
        found[name] = uncached(olmoe, tokens)
    assert (prepared.recalling_layer, routing.recalling_layer) == (1, None)
    assert torch.equal(found["again"], found["both"]) and not torch.equal(found["routing"], found["both"])


# hooks, threads and forwards that do not end


def test_a_memory_of_the_decoder_alone_does_not_keep_later_ones_from_recalling(olmoe, tokens):
    memory, alone = random_memory(olmoe, **MIXED), tiny_model("olmoe")
    attach_memory(alone, memory)
    attach_memory(olmoe.model, random_memory(olmoe, seed=4), "of the decoder")
    attach_memory(olmoe, memory)
    close(uncached(olmoe, tokens), uncached(alone, tokens))
    detach_memory(olmoe)
    assert not hooks_of(olmoe)


def test_a_memory_attached_during_a_forward_is_recalled_from_the_next_one_on(olmoe, tokens):
    base, memory = uncached(olmoe, tokens), random_memory(olmoe, **MIXED)
    handle = olmoe.model.layers[0].register_forward_pre_hook(lambda *_: attach_in_another_thread(olmoe, memory))
    assert torch.equal(uncached(olmoe, tokens), base)
    handle.remove()
    assert not torch.equal(uncached(olmoe, tokens), base)


def attach_in_another_thread(model, memory):
    if RoutingHooks.of(model) is None:
        thread = threading.Thread(target=attach_memory, args=(model, memory))
        thread.start()
        thread.join()


def test_an_interrupted_or_failed_forward_leaves_nothing_for_the_output_embeddings(remembering, tokens):
    wanted, hidden = uncached(remembering, tokens), torch.zeros(3, 12, 32)
    for error in (KeyboardInterrupt, KeyError):

        def interrupt(*_, error=error):
            raise error

        handle = remembering.model.norm.register_forward_hook(interrupt)
        with pytest.raises(error):
            uncached(remembering, tokens)
        handle.remove()
        close(uncached(remembering, tokens), wanted)
        with pytest.raises(UnsupportedModelError, match="ran outside of a forward"):
            remembering.lm_head(hidden)


def test_threads_recall_each_with_the_memory_in_force_for_it(remembering, tokens):
    wanted = uncached(remembering, tokens)
    with disable_memory(remembering):
        base = uncached(remembering, tokens)
    both, right = threading.Barrier(2), []

    def work(off: bool):
        context = disable_memory(remembering) if off else contextlib.nullcontext()
        with context:
            for _ in range(10):
                both.wait()
                right.append(torch.equal(uncached(remembering, tokens), base if off else wanted))

    threads = [threading.Thread(target=work, args=(off,)) for off in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 20


def test_one_model_run_inside_another_does_not_disturb_it(remembering, tokens):
    other = tiny_model("qwen3_moe")
    attach_memory(other, random_memory(other, **MIXED))
    wanted, inner = uncached(remembering, tokens), uncached(other, tokens[:, :5])
    found = []
    handle = remembering.model.norm.register_forward_hook(lambda *_: found.append(uncached(other, tokens[:, :5])))
    close(uncached(remembering, tokens), wanted)
    handle.remove()
    close(found[0], inner)
