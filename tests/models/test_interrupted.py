"""Forwards that were interrupted, gates that were replaced, copies made inside a context: none is silently wrong."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model

from knnmoe_hf import active_memory, attach_memory, attach_override, detach_memory, disable_memory, set_memory
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.models.gates import find_gates
from tests.support.attaching import hooks_of
from tests.support.models import random_memory, tiny_model


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def interrupt(model, tokens, error: type[BaseException]) -> None:
    """A forward that raises in the first layer, after its attention and before its gate."""

    def fail(*_):
        raise error("interrupted")

    handle = model.model.layers[0].post_attention_layernorm.register_forward_hook(fail)
    with pytest.raises(error, match="interrupted"):
        logits_of(model, tokens)
    handle.remove()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_tokens_of_an_interrupted_forward_are_not_taken_by_a_gate_with_the_memory_off(family, tokens, error):
    model = tiny_model(family)
    (gate, _), x = find_gates(model), torch.randn(tokens.numel(), 32, generator=torch.Generator().manual_seed(0))
    own = gate.module(x)
    attach_memory(model, random_memory(model))
    on = logits_of(model, tokens)
    interrupt(model, tokens, error)
    with disable_memory(model):
        assert all(torch.equal(a, b) for a, b in zip(gate.module(x), own))
    assert torch.equal(logits_of(model, tokens), on)


def test_tokens_of_a_forward_that_raised_are_not_taken_by_a_gate_with_the_memory_in_force(family, tokens):
    model = tiny_model(family)
    attach_memory(model, random_memory(model))
    interrupt(model, tokens, RuntimeError)
    with pytest.raises(UnsupportedModelError, match="did not arrive there"):
        find_gates(model)[0].module(torch.zeros(tokens.numel(), 32))


def replace_gates(model, layers) -> None:
    for gate in find_gates(model):
        if gate.layer in layers:
            twin = copy.deepcopy(gate.module)
            twin._forward_hooks.clear()
            model.get_submodule(gate.name.rpartition(".")[0]).register_module(gate.name.rpartition(".")[2], twin)


def call_forward_directly(model, layers) -> None:
    """The blocks of these layers call their gate's `forward`, which runs no hooks."""
    for gate in find_gates(model):
        if gate.layer in layers:
            gate.module._call_impl = gate.module.forward


@pytest.mark.parametrize("layers", [[0, 1], [1]])
@pytest.mark.parametrize("change", [replace_gates, call_forward_directly])
def test_gates_that_no_longer_call_their_override_raise(family, tokens, change, layers):
    model = tiny_model(family)
    base = logits_of(model, tokens)
    attach_memory(model, random_memory(model))
    change(model, layers)
    with pytest.raises(UnsupportedModelError, match=rf"gates of layers \[{', '.join(map(str, layers))}\] did not run"):
        logits_of(model, tokens)
    with disable_memory(model):
        assert torch.equal(logits_of(model, tokens), base)


def test_gates_that_an_adapter_copied_after_attaching_are_refused_until_the_memory_is_detached(tokens):
    model = tiny_model("olmoe")
    base = logits_of(model, tokens)
    attach_memory(model, random_memory(model))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"]))
    with pytest.raises(UnsupportedModelError, match=r"gates of layers \[0, 1\] did not run"):
        logits_of(adapted, tokens)
    detach_memory(adapted)
    assert torch.equal(logits_of(adapted, tokens), base)


def test_a_model_that_runs_only_its_first_layers_is_not_refused(family, tokens):
    """As in assisted generation with early exit, which changes the config for the time of a forward."""
    model = tiny_model(family)
    attach_memory(model, random_memory(model))
    on = logits_of(model, tokens)
    model.model.config.num_hidden_layers = 1
    early = logits_of(model, tokens)
    with disable_memory(model):
        assert not torch.equal(logits_of(model, tokens), early)
    model.model.config.num_hidden_layers = 2
    assert torch.equal(logits_of(model, tokens), on)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_disable_memory_is_outside_of_it(family, tokens, copied):
    model = tiny_model(family)
    base = logits_of(model, tokens)
    attach_memory(model, random_memory(model))
    on = logits_of(model, tokens)
    with disable_memory(model):
        twin = copied(model)
        assert torch.equal(logits_of(model, tokens), base)
    assert active_memory(twin) == "default" and torch.equal(logits_of(twin, tokens), on)
    with disable_memory(twin):
        assert active_memory(twin) is None and torch.equal(logits_of(twin, tokens), base)
    attach_memory(twin, random_memory(twin, seed=5), "other")
    set_memory(twin, "default")
    assert torch.equal(logits_of(twin, tokens), on)
    detach_memory(twin)
    assert torch.equal(logits_of(twin, tokens), base)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())


@pytest.mark.parametrize(
    "change",
    [
        lambda output: output[0],
        lambda output: list(output),
        lambda output: output[:2],
        lambda output: (output[0], output[1][:3], output[2]),
        lambda output: (output[0][:, :2], output[1], output[2]),
        lambda output: "the first expert",
    ],
)
def test_an_override_that_returns_no_routing_of_the_gates_shapes_is_refused(family, tokens, change):
    model = tiny_model(family)
    attach_override(model, {1: lambda x, output, tokens: change(output) if len(x) == 36 else None})
    with pytest.raises(TypeError, match="routing override of layer 1 returned .*must return None, or a tuple"):
        logits_of(model, tokens)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_detaching_leaves_no_hook_though_the_traceback_of_a_forward_is_kept(tokens, error):
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model))
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: raise_(error))
    with pytest.raises(error) as kept:  # as a notebook keeps it
        model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    handle.remove()
    detach_memory(model)
    assert kept.tb is not None and not hooks_of(model)


def raise_(error: type[BaseException]):
    raise error
