"""Calls that a lookup refuses, and the seam for runtimes that apply the routing rule themselves."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from knnmoe_hf import attach_memory, disable_memory, native
from knnmoe_hf.lookup.sequence import Tokens
from tests.support.attaching import lookup_in_force, own_output
from tests.support.models import random_memory, tiny_model

GATE = "model.layers.0.mlp.gate.weight"
TOKENS = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kernels", [native.kernels, None], ids=["native", "torch"])
def test_functorch_transforms_and_forward_mode_are_refused_with_the_way_out(kernels, monkeypatch):
    monkeypatch.setattr(native, "kernels", kernels)
    model = tiny_model("olmoe", attn_implementation="eager").requires_grad_(False)
    model.set_experts_implementation("batched_mm")  # the only one that forward mode goes through
    attach_memory(model, random_memory(model))
    gate = model.get_parameter(GATE).detach()

    def loss(weight):
        return functional_call(model, {GATE: weight}, (), dict(input_ids=TOKENS)).logits.square().mean()

    def in_forward_mode(function):
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(gate, gate))

    for transform in (
        lambda f: grad(f)(gate),
        lambda f: jvp(f, (gate,), (gate,)),
        lambda f: vmap(f)(torch.stack([gate, gate])),
        in_forward_mode,
    ):
        with pytest.raises(NotImplementedError, match="use backward\\(\\), or run inside disable_memory"):
            transform(loss)
        with disable_memory(model):
            transform(loss)
    weight = gate.clone().requires_grad_()
    assert torch.autograd.grad(loss(weight), weight)[0].abs().max() > 0  # backward goes through a memory


def test_a_gate_on_another_device_than_its_memory_is_refused():
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model))
    lookup = lookup_in_force(model)
    x, logits = torch.zeros(3, 32, device="meta"), torch.zeros(3, 8, device="meta")
    with pytest.raises(RuntimeError, match="layer 0 runs on meta, its memory was prepared for cpu: detach"):
        lookup(x, (logits, *lookup.rule(logits, 2)), Tokens(1, 3))


@pytest.mark.parametrize("space", ["logits", "delta"])
@pytest.mark.parametrize("count", [1, 6])
def test_mixed_logits_routed_by_the_models_rule_are_the_route(family, space, count):
    model = tiny_model(family)
    attach_memory(model, random_memory(model, value_space=space))
    lookup, x = lookup_in_force(model), torch.randn(6, 32, generator=torch.Generator().manual_seed(0))[:count]
    x[-1] = 1e3 if count > 1 else x[-1]  # unlike all keys: keeps its own logits to the bit
    own = own_output(model, x)
    mixed = lookup.logits(x, own[0], Tokens(1, count))
    expected = lookup.route(x, own, Tokens(1, count))
    assert torch.equal(mixed, expected[0]) and not torch.equal(mixed[0], own[0][0])
    assert all(torch.equal(one, other) for one, other in zip(lookup.rule(mixed, 2), expected[1:]))
    assert count == 1 or torch.equal(mixed[-1], own[0][-1])


def test_assignments_cannot_be_mixed_as_logits():
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model, value_space="assignment"))
    with pytest.raises(ValueError, match="value_space='assignment' mixes expert weights, not logits"):
        lookup_in_force(model).logits(torch.zeros(1, 32), torch.zeros(1, 8), Tokens(1, 1))
