"""What would leave recalled next tokens out is refused, when attaching or at the call."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from knnmoe_hf import attach_memory, detach_memory, disable_memory, get_memory
from knnmoe_hf.errors import MemoryMismatchError, UnsupportedModelError
from tests.models.recalling import MIXED
from tests.support.attaching import hooks_of
from tests.support.caches import uncached
from tests.support.models import random_memory


def loss_without_the_head(model):
    """As Liger's kernels do: the loss from the hidden states and the head's weight."""

    def forward(input_ids, labels=None, **kwargs):
        hidden = model.model(input_ids=input_ids, **kwargs).last_hidden_state
        return hidden @ model.lm_head.weight.T

    model.forward = forward


def wrapped_head(model):
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))


def resized(model):
    model.resize_token_embeddings(pad_to_multiple_of=64)


CHANGES = {
    loss_without_the_head: r"ran 0 times in a forward .* must run once: .*use_liger_kernel=False",
    wrapped_head: "has other output embeddings than when the memory was attached",
    resized: "has other output embeddings than when the memory was attached",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_takes_its_logits_from_elsewhere_is_refused_after_attaching(remembering, tokens, change):
    change(remembering)
    with pytest.raises(UnsupportedModelError, match=CHANGES[change]):
        remembering(input_ids=tokens)
    with disable_memory(remembering):
        remembering(input_ids=tokens)
        routing = random_memory(remembering)
    attach_memory(remembering, routing, "routing")
    remembering(input_ids=tokens)


@pytest.mark.parametrize("change", [wrapped_head, resized])
def test_a_memory_attached_again_recalls_with_the_new_output_embeddings(remembering, tokens, change):
    memory = get_memory(remembering)
    change(remembering)
    attach_memory(remembering, memory, "again")  # while the hooks of the first are still there
    found = uncached(remembering, tokens)
    detach_memory(remembering)
    base = uncached(remembering, tokens)
    attach_memory(remembering, memory)
    assert torch.equal(uncached(remembering, tokens), found) and not torch.equal(found, base)
    detach_memory(remembering)
    assert not hooks_of(remembering)


def test_output_embeddings_that_run_apart_from_a_forward_are_refused(remembering, tokens):
    with torch.no_grad():
        hidden = remembering.model(tokens).last_hidden_state
        for call in (lambda: remembering.lm_head(hidden), lambda: remembering.forward(tokens)):
            with pytest.raises(UnsupportedModelError, match="ran outside of a forward of their model"):
                call()
            with disable_memory(remembering):
                call()


def test_output_embeddings_that_get_other_tokens_than_were_asked_for_are_refused(remembering, tokens):
    def last_alone(head, args):
        return args[0][:, -1:]

    handle = remembering.lm_head.register_forward_pre_hook(last_alone)
    with pytest.raises(UnsupportedModelError, match=r"got 3 tokens of a call of \[3, 12\] whose logits_to_keep asks"):
        remembering(input_ids=tokens)
    handle.remove()
    remembering(input_ids=tokens)


def test_a_decoder_without_output_embeddings_is_refused_and_untouched(olmoe):
    with pytest.raises(UnsupportedModelError, match=r"OlmoeModel has no output embeddings.*recall='routing'"):
        attach_memory(olmoe.model, random_memory(olmoe, **MIXED))
    assert not hooks_of(olmoe)


def with_bias_of_each_token(model, logits):
    return logits + torch.arange(logits.shape[-1])


def squared(model, logits):
    return logits.square()


def negative(model, logits):
    return -logits


@pytest.mark.parametrize("change", [with_bias_of_each_token, squared, negative])
def test_logits_that_are_an_unknown_function_of_the_output_are_refused_when_attaching(olmoe, change):
    inner = olmoe.forward

    def forward(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits = change(olmoe, out.logits)
        return out

    olmoe.forward = forward
    with pytest.raises(UnsupportedModelError, match=r"its logits are neither the output .* use recall='routing'"):
        attach_memory(olmoe, random_memory(olmoe, **MIXED))
    assert not hooks_of(olmoe)


def test_hidden_states_that_are_changed_before_the_output_embeddings_are_refused_when_attaching(olmoe):
    handle = olmoe.lm_head.register_forward_pre_hook(lambda head, args: args[0].flip(1))
    with pytest.raises(UnsupportedModelError, match="do not get what its decoder returned"):
        attach_memory(olmoe, random_memory(olmoe, **MIXED))
    handle.remove()
    assert not hooks_of(olmoe)


def test_tokens_beyond_the_vocabulary_are_refused_when_attaching(olmoe):
    memory = random_memory(olmoe, **MIXED)
    memory = replace(memory, stored_next_tokens=memory.next_tokens.clone().fill_(96))
    with pytest.raises(MemoryMismatchError, match="recalls the token 96, and the model has logits of 96 tokens"):
        attach_memory(olmoe, memory)
    assert not hooks_of(olmoe)
