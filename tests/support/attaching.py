"""A memory in force inside a `with` block, one layer's lookup called as its gate's hook does, and a model's hooks."""

from contextlib import contextmanager

import torch

from knnmoe_hf import active_memory, attach_memory, detach_memory, disable_memory, set_memory
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import RoutingHooks


@contextmanager
def attached(model, memory):
    before, name = active_memory(model), "under test"
    attach_memory(model, memory, name)
    try:
        yield
    finally:
        detach_memory(model, name)
        if before is not None:
            set_memory(model, before)


def lookup_in_force(model, layer=0):
    return RoutingHooks.of(model).current[layer]


def own_output(model, x, layer=0):
    """The gate's own logits, weights and ids for inputs x (T, d)."""
    (gate,) = [gate for gate in find_gates(model) if gate.layer == layer]
    with disable_memory(model), torch.no_grad():
        return gate.module(x)


def routed(model, x, layer=0, tokens=None):
    """What one layer routes inputs x (T, d) of one sequence by, with the memory in force."""
    own = own_output(model, x, layer)
    return lookup_in_force(model, layer)(x, own, tokens or Tokens(1, len(x))) or own


def hooks_of(model) -> list:
    """All forward hooks of a model's modules."""
    return [h for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks) for h in d.values()]
