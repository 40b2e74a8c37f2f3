"""A memory is set, attached or detached while something runs: it ends with what it began with."""

import copy
from contextlib import nullcontext

import pytest
import torch

from knnmoe_hf import active_memory, attach_memory, detach_memory, disable_memory, set_memory, use_memory
from knnmoe_hf.evaluation import compare
from knnmoe_hf.models.hooks import RoutingHooks
from tests.evaluation.test_scores import examples
from tests.models.callers import CALLBACKS, CHANGES, alone, generated, halfway, in_thread, logits_of
from tests.support.attaching import hooks_of
from tests.support.models import random_memory, tiny_model


@pytest.mark.parametrize("where", ["here", "in a thread"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("context", [False, True])
def test_a_generation_ends_with_what_it_began_with(shared, tokens, callback, change, where, context):
    expected, base = generated(shared, tokens), None
    with disable_memory(shared):
        base = generated(shared, tokens)

    def act():
        CHANGES[change](shared) if where == "here" else in_thread(CHANGES[change], shared)

    with use_memory(shared, "law") if context else nullcontext():
        found = generated(shared, tokens, **CALLBACKS[callback](act))
        assert torch.equal(found, expected)
        wanted = {"set": "music", "attach": "new", "detach another": "law"}.get(change)
        if context and where == "in a thread":
            wanted = "law"
        assert active_memory(shared) == wanted
        if wanted is None:
            assert torch.equal(generated(shared, tokens), base)
    if change == "detach all":
        assert not hooks_of(shared)


@pytest.mark.parametrize("where", ["here", "in a thread"])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_generation_that_began_without_a_memory_ends_without_one(tokens, callback, where):
    model = tiny_model("olmoe")
    base, memory = generated(model, tokens), random_memory(model)

    def act():
        attach_memory(model, memory) if where == "here" else in_thread(attach_memory, model, memory)

    assert torch.equal(generated(model, tokens, **CALLBACKS[callback](act)), base)
    assert active_memory(model) == "default" and not torch.equal(generated(model, tokens), base)
    detach_memory(model)
    assert not hooks_of(model)


def test_what_a_callback_runs_in_a_context_of_its_own_does_not_leak_into_the_generation(shared, tokens):
    expected = generated(shared, tokens)
    base = alone(shared, lambda model: logits_of(model, tokens))
    seen = []

    def act():  # as contrastive decoding does
        with disable_memory(shared):
            seen.append(torch.equal(logits_of(shared, tokens), base[None]))
        with use_memory(shared, "music"):
            seen.append(torch.equal(logits_of(shared, tokens), base["music"]))

    assert torch.equal(generated(shared, tokens, **CALLBACKS["logits processor"](act)), expected)
    assert seen == [True, True]


def test_an_assistant_keeps_its_own_memory_too(shared, tokens):
    assistant = copy.deepcopy(shared)
    expected, drafts = generated(shared, tokens), []
    drafting = assistant.model.register_forward_hook(lambda *_: drafts.append(active_memory(assistant)))
    callback = CALLBACKS["logits processor"](lambda: in_thread(set_memory, assistant, "music"))
    assert torch.equal(generated(shared, tokens, assistant_model=assistant, **callback), expected)
    drafting.remove()
    assert set(drafts) == {"law"} and active_memory(assistant) == "music"


@pytest.mark.parametrize("where", ["here", "in a thread"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_ends_with_what_it_began_with(shared, tokens, change, where):
    expected = alone(shared, lambda model: logits_of(model, tokens))

    def act():
        CHANGES[change](shared) if where == "here" else in_thread(CHANGES[change], shared)

    halfway(shared, act)
    assert torch.equal(logits_of(shared, tokens), expected["law"])
    if change.startswith("detach ") and change != "detach another":
        assert torch.equal(logits_of(shared, tokens), expected[None])
    assert bool(hooks_of(shared)) == (change != "detach all")


@pytest.mark.parametrize("where", ["here", "in a thread"])
def test_a_forward_that_began_before_the_first_memory_was_attached_ends_without_it(family, tokens, where):
    model = tiny_model(family)
    base, memory = logits_of(model, tokens), random_memory(model)
    halfway(
        model, lambda: attach_memory(model, memory) if where == "here" else in_thread(attach_memory, model, memory)
    )
    assert torch.equal(logits_of(model, tokens), base)
    assert not torch.equal(logits_of(model, tokens), base)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("after", ["the context", "a switch", "detaching all", "detaching all in a thread"])
def test_a_backward_with_checkpoints_runs_with_what_the_forward_ran_with(shared, tokens, reentrant, after):
    model = shared.train()
    embedding = model.get_input_embeddings().weight

    def gradient(checkpoints):
        model.zero_grad()
        model.gradient_checkpointing_disable()
        if checkpoints:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        with use_memory(model, "music") if after == "the context" else nullcontext():
            loss = model(tokens, labels=tokens, use_cache=False).loss
        if checkpoints and after == "a switch":
            in_thread(set_memory, model, "music")
        elif checkpoints and after.startswith("detaching all"):
            in_thread(detach_memory, model) if after.endswith("thread") else detach_memory(model)
        loss.backward()
        return embedding.grad.clone()

    torch.testing.assert_close(gradient(False), gradient(True), atol=1e-6, rtol=1e-5)
    if after.startswith("detaching"):
        assert RoutingHooks.of(model) is None


@pytest.mark.parametrize("where", ["here", "in a thread"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_comparison_ends_with_what_it_began_with(shared, change, where):
    rows = examples()
    wanted = compare(shared, rows, batch_size=2)

    def act():
        CHANGES[change](shared) if where == "here" else in_thread(CHANGES[change], shared)

    halfway(shared, act)
    found = compare(shared, rows, batch_size=2)
    assert torch.equal(found.memory.nll, wanted.memory.nll) and torch.equal(found.base.nll, wanted.base.nll)
    assert found.confidence == wanted.confidence
