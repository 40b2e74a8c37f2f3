"""An override is called only with the tokens of its own call; if these do not arrive, the call is refused."""

from dataclasses import replace
from types import MethodType

import pytest
import torch
from torch import nn

from knnmoe_hf import attach_memory, attach_override, detach_memory, disable_memory, set_memory
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import RoutingHooks
from tests.support.attaching import own_output
from tests.support.caches import padded
from tests.support.models import random_memory, tiny_model

LOST = "the tokens of the model's call did not arrive there"


def logits_of(model, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def drop_arguments(model):
    """The decoder gives its layers only the usual keyword arguments, and drops all others."""
    whole = model.model.forward
    model.model.forward = lambda *args, knnmoe_tokens=None, **kwargs: whole(*args, **kwargs)


@pytest.mark.parametrize("what", ["memory", "override"])
def test_a_model_that_does_not_pass_tokens_to_its_gates_is_refused_at_attach(family, what):
    model = tiny_model(family)
    memory = random_memory(model)
    drop_arguments(model)
    with pytest.raises(UnsupportedModelError, match=LOST):
        if what == "memory":
            attach_memory(model, memory)
        else:
            attach_override(model, {0: lambda x, output, tokens: None, 1: lambda x, output, tokens: None})
    assert RoutingHooks.of(model) is None and not any(module._forward_hooks for module in model.modules())


def test_tokens_that_do_not_arrive_after_attach_raise(family, tokens):
    model = tiny_model(family)
    attach_memory(model, random_memory(model))
    ids, mask = padded(tokens, "left")
    logits_of(model, ids, mask)
    drop_arguments(model)
    with pytest.raises(UnsupportedModelError, match=LOST):
        logits_of(model, ids, mask)
    with disable_memory(model):
        logits_of(model, ids, mask)
    detach_memory(model)
    logits_of(model, ids, mask)


def test_layers_whose_forward_is_called_instead_of_themselves_get_the_tokens_too(family, tokens):
    """As gradient checkpointing does when it runs them again: the hooks of the layers do not run then."""
    model = tiny_model(family)
    attach_memory(model, random_memory(model))
    expected = logits_of(model, tokens)

    class Bare(type(model.model.layers[0])):
        def __call__(self, *args, **kwargs):
            return self.forward(*args, **kwargs)

    for layer in model.model.layers:
        layer.__class__ = Bare
    assert torch.equal(logits_of(model, tokens), expected)
    attach_memory(model, random_memory(model), "second")


class NoAttention(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return torch.zeros_like(hidden_states), None


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_layers_without_attention_are_routed(model, tokens, layers):
    """As in hybrid models, where a layer has a convolution or a state space model in its place."""
    for layer in layers:
        model.model.layers[layer].self_attn = NoAttention()
    base, rows = logits_of(model, tokens), {}
    attach_override(model, {i: lambda x, output, call, i=i: rows.update({i: call.shape}) for i in range(2)}, "seen")
    assert torch.equal(logits_of(model, tokens), base) and rows == {0: (3, 12), 1: (3, 12)}
    detach_memory(model)
    attach_memory(model, random_memory(model))
    assert not torch.equal(logits_of(model, tokens), base)


@pytest.mark.parametrize("gates", [[0], [1], [0, 1]])
def test_no_layer_gets_an_argument_that_it_does_not_know(tokens, gates):
    """Neither its attention nor other hooks on it, and neither with a gate nor without one."""
    model = tiny_model("qwen3_moe", mlp_only_layers=[layer for layer in range(2) if layer not in gates])
    met = []
    for module in model.model.layers.modules():
        module.register_forward_pre_hook(lambda _, args, kwargs: met.append(set(kwargs)), with_kwargs=True)
    base = logits_of(model, tokens)
    without = list(met)
    met.clear()
    attach_memory(model, random_memory(model))
    assert not torch.equal(logits_of(model, tokens), base)
    assert met[-len(without) :] == without


def test_a_gate_that_is_called_alone_is_refused_with_the_way_out(family):
    model = tiny_model(family)
    attach_memory(model, random_memory(model))
    (gate, _), x = find_gates(model), torch.zeros(3, 32)
    with pytest.raises(UnsupportedModelError, match="layer 0 ran.*disable_memory\\(model\\) around calls of single"):
        gate.module(x)
    with disable_memory(model):
        gate.module(x)


def test_tokens_of_another_models_call_are_not_used(tokens):
    """A layer without a gate leaves its tokens behind; the next model's gate must not use them."""
    first, second = tiny_model("qwen3_moe", mlp_only_layers=[1]), tiny_model("olmoe")
    attach_memory(first, random_memory(first))
    attach_memory(second, random_memory(second))
    logits_of(first, tokens)  # its last layer is dense
    gate = find_gates(second)[0].module
    with pytest.raises(UnsupportedModelError, match=LOST):
        gate(torch.zeros(tokens.numel(), 32))


def test_a_gate_that_gets_only_a_part_of_the_tokens_is_refused(model, tokens):
    attach_memory(model, random_memory(model))
    gate = find_gates(model)[0]
    block = model.get_submodule(gate.name.rpartition(".")[0])
    forward = block.forward
    block.forward = MethodType(lambda self, hidden_states, **kwargs: forward(hidden_states[:, :5].contiguous()), block)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 got 15 tokens of a call of \[3, 12\]"):
        logits_of(model, tokens)


def test_an_override_decides_the_routing_of_every_token_and_gets_the_padding(model, tokens):
    ids, mask = padded(tokens, "left")
    gates, masks = find_gates(model), []

    def first_experts(x, output, of_call):
        masks.append(of_call.real.view(of_call.shape).clone())
        logits = torch.zeros_like(output[0])
        logits[:, :2] = 5.0
        return logits, *gates[0].rule(logits, 2)

    base = logits_of(model, ids, mask)
    attach_override(model, {0: first_experts}, "first experts")
    used = []
    handle = gates[0].module.register_forward_hook(lambda _, args, output: used.append(output[2]))
    changed = logits_of(model, ids, mask)
    handle.remove()
    assert not torch.equal(changed, base) and set(used[0].flatten().tolist()) == {0, 1}
    assert torch.equal(masks[0], mask.bool())
    detach_memory(model)
    assert torch.equal(logits_of(model, ids, mask), base)
    assert own_output(model, torch.zeros(1, 32))[0].shape == (1, 8)


def halfway(model, switch):
    """Calls `switch` between the gates of the first and the second layer."""
    handle = model.model.layers[0].register_forward_hook(lambda *_: (handle.remove(), switch(), None)[-1])


@pytest.mark.parametrize("switch", ["disable", "set", "detach one"])
def test_a_switch_during_a_forward_takes_effect_with_the_next_one(family, tokens, switch):
    model = tiny_model(family)
    attach_memory(model, random_memory(model, seed=5), "other")
    attach_memory(model, random_memory(model), "law")
    on = logits_of(model, tokens)
    context = disable_memory(model)
    halfway(
        model,
        {
            "disable": context.__enter__,
            "set": lambda: set_memory(model, "other"),
            "detach one": lambda: detach_memory(model, "law"),
        }[switch],
    )
    assert torch.equal(logits_of(model, tokens), on)
    assert not torch.equal(logits_of(model, tokens), on)
    if switch == "disable":
        context.__exit__(None, None, None)
        assert torch.equal(logits_of(model, tokens), on)


def test_a_forward_that_began_without_a_memory_ends_without_it(family, tokens):
    model = tiny_model(family)
    base = logits_of(model, tokens)
    attach_memory(model, random_memory(model))
    context = disable_memory(model)
    context.__enter__()
    halfway(model, lambda: context.__exit__(None, None, None))
    assert torch.equal(logits_of(model, tokens), base)
    assert not torch.equal(logits_of(model, tokens), base)


def test_a_block_called_alone_after_a_forward_is_refused(family, tokens):
    """Only the first layer has an override: nothing of a forward may be left over in layers without one."""
    model = tiny_model(family)
    memory = random_memory(model)
    attach_memory(model, replace(memory, layers={0: memory.layers[0]}))
    logits_of(model, tokens)
    block = model.get_submodule(find_gates(model)[0].name.rpartition(".")[0])
    with pytest.raises(UnsupportedModelError, match=LOST), torch.no_grad():
        block(torch.zeros(*tokens.shape, 32))


def test_embeddings_may_be_given_by_position(family, tokens):
    model = tiny_model(family)
    attach_memory(model, random_memory(model))
    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens)
        by_position = model.model(None, None, None, None, embedded).last_hidden_state
        by_name = model.model(inputs_embeds=embedded).last_hidden_state
    assert torch.equal(by_position, by_name)
