"""Attaching memories to a model: several by name, one in force, none of it left after `detach_memory`."""

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.make import make_confidences
from knnmoe_hf.lookup.torch_lookup import LayerLookup, Observer
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.gates import check_gates, find_gates
from knnmoe_hf.models.hooks import RoutingHooks

logger = logging.getLogger(__name__)


class AttachedMemory(dict):
    """The lookups of one attached memory, `{layer: LayerLookup}`, and the memory that they read."""

    def __init__(self, memory: RoutingMemory, lookups: dict[int, LayerLookup]):
        super().__init__(lookups)
        self.memory = memory

    def __deepcopy__(self, memo: dict) -> "AttachedMemory":
        # a copied model shares the memory and its tables, as it would share a file
        return AttachedMemory(self.memory, {layer: copy.copy(lookup) for layer, lookup in self.items()})


def attach_memory(model: nn.Module, memory: RoutingMemory, name: str = "default") -> None:
    """
    Attaches a memory and puts it in force; the model's weights, class and forward stay as they are.

    Args:
        model: an OLMoE, Qwen3-MoE or GPT-OSS of transformers, plain or PEFT-wrapped, in any float dtype; each
            layer's rows are put on the device where that layer's gate runs.
        memory: one that was built for this model.
        name: for `set_memory` and `detach_memory`; another memory may already be attached under another.

    Raises:
        UnsupportedModelError: if a hook on the gates would not decide the routing.
        MemoryMismatchError: if the memory belongs to another model; the model is untouched then.
        ValueError: if the name is taken.
    """
    if not isinstance(memory, RoutingMemory):
        raise TypeError(f"{shown(memory)} is no RoutingMemory: open one with RoutingMemory.from_pretrained.")
    if not isinstance(name, str):
        raise TypeError(f"{shown(name)} is no name of a memory: use a string.")
    hooks = RoutingHooks.of(model)
    if hooks is not None and name in hooks.named:
        raise ValueError(f"a memory named {shown(name)} is already attached: detach it or choose another name.")
    memory.check_config()
    memory.check_model(model)
    gates = find_gates(model)
    if hooks is None:
        devices = check_gates(model, gates)
    else:
        with hooks.suspended():
            devices = check_gates(model, gates)
    routes = AttachedMemory(memory, {})
    confidences = make_confidences(memory.layers, memory.config) if len(memory) else {}
    for gate in gates:
        if gate.layer in confidences:
            rows = memory.layers[gate.layer].to(devices[gate.layer])
            asked = (confidences[gate.layer], gate.rule, gate.top_k, memory.config)
            routes[gate.layer] = LayerLookup(gate.layer, rows, *asked)
    if not routes:
        logger.warning("the memory %r has no rows: the model routes as if it were not attached", name)
    if hooks is None:
        hooks = RoutingHooks(model, gates)
    hooks.named[name] = routes
    hooks.active = name
    _refresh(model, hooks)


def detach_memory(model: nn.Module, name: str | None = None) -> None:
    """
    Takes a memory off the model, or all of them; with the last one every hook goes.

    Args:
        model: the model.
        name: the memory's name; None for all.

    Raises:
        ValueError: if no such memory is attached.
    """
    hooks = _attached(model, name)
    for gone in list(hooks.named) if name is None else [name]:
        del hooks.named[gone]
    if hooks.active not in hooks.named:
        hooks.active = None
    _refresh(model, hooks)
    if not hooks.named:
        hooks.remove()


def set_memory(model: nn.Module, name: str) -> None:
    """
    Puts the attached memory of this name in force, instead of the one that was.

    Raises:
        ValueError: if no such memory is attached.
    """
    hooks = _attached(model, name)
    hooks.active = name
    hooks.select()


def active_memory(model: nn.Module) -> str | None:
    """Name of the memory in force; None if there is none or it is disabled."""
    hooks = RoutingHooks.of(model)
    return None if hooks is None or hooks.disabled else hooks.active


def get_memory(model: nn.Module, name: str | None = None) -> RoutingMemory:
    """
    The attached memory of this name, by default the one that `set_memory` chose.

    Raises:
        ValueError: if there is none.
    """
    hooks = _attached(model, name)
    name = hooks.active if name is None else name
    if name is None:
        raise ValueError(f"no memory is in force: call set_memory with one of {shown(list(hooks.named))}.")
    return hooks.named[name].memory


@contextmanager
def disable_memory(model: nn.Module) -> Iterator[None]:
    """
    Inside, the model is bit-exactly the base model; contexts nest.

    Without a memory it does nothing, and one that is attached inside is in force.
    """
    hooks = RoutingHooks.of(model)
    with hooks.suspended() if hooks is not None else nullcontext():
        yield


@contextmanager
def attached(model: nn.Module, memory: RoutingMemory) -> Iterator[None]:
    """Inside, `memory` is in force, even within `disable_memory`; afterwards the model is as before."""
    hooks = RoutingHooks.of(model)
    before = hooks.active if hooks is not None else None
    name = f"temporary {id(memory)}"
    attach_memory(model, memory, name)
    try:
        with RoutingHooks.of(model).resumed():
            yield
    finally:
        detach_memory(model, name)
        if before is not None:
            set_memory(model, before)


@contextmanager
def watch_lookups(model: nn.Module, observer: Observer) -> Iterator[None]:
    """
    Calls `observer(layer, neighbors, confidence)` for every lookup of the memory in force; costs nothing outside.

    Args:
        model: a model with a memory.
        observer: gets the layer, `Neighbors` of (T, K), and the confidence (T,), 0 for padding, in place of an
            observer that watches already.
    """
    hooks = _attached(model, None)
    lookups = list(hooks.named[hooks.active].values()) if hooks.active is not None else []
    before = [lookup.observer for lookup in lookups]
    for lookup in lookups:
        lookup.observer = observer
    try:
        yield
    finally:
        for lookup, outer in zip(lookups, before):
            lookup.observer = outer


def _attached(model: nn.Module, name: str | None) -> RoutingHooks:
    hooks = RoutingHooks.of(model)
    if hooks is None:
        raise ValueError(f"no memory is attached to this {type(model).__name__}: call attach_memory first.")
    if name is not None and name not in hooks.named:
        raise ValueError(f"no memory named {shown(name)} is attached: choose among {shown(list(hooks.named))}.")
    return hooks


def _refresh(model: nn.Module, hooks: RoutingHooks) -> None:
    hooks.select()
    _forget_compiled(model)


def _forget_compiled(model: nn.Module) -> None:
    """Drops compiled graphs: they do not look at hooks again, so they would go on without (or with) the memory."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "_compiled_call", None) is not None:
            del module._compiled_call  # what `generate` keeps; it makes a new one if there is none
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
