"""Attaching memories and other overrides to a model: several by name, one in force, nothing left after detaching.

Preparing a memory (fingerprint, probe, engines) happens once; what is in force is a switch.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

from torch import nn

from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.confidence import Confidence
from knnmoe_hf.lookup.events import LookupObserver
from knnmoe_hf.lookup.make import make_lookups
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.torch_lookup import TorchLookup
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.hooks import Overrides, RoutingHooks, RoutingOverride
from knnmoe_hf.models.precision import warn_if_slow
from knnmoe_hf.models.probe import ProbedModel, probe_model

logger = logging.getLogger(__name__)


class AttachedMemory(Overrides):
    """
    A memory prepared for a model: one lookup for each of its layers, with a frozen snapshot of its options.

    Attributes:
        memory: what was prepared. Changing its `config` afterwards has no effect here.
        model: what the probe found of the model.
        options: the snapshot.
    """

    def __init__(
        self,
        memory: RoutingMemory,
        model: ProbedModel,
        lookups: Mapping[int, TorchLookup],
        options: RetrievalOptions,
    ):
        super().__init__(lookups)
        self.memory, self.model, self.options = memory, model, options

    @classmethod
    def of(cls, memory: RoutingMemory, model: ProbedModel, options: RetrievalOptions) -> "AttachedMemory":
        """Moves each layer's rows to the device of its gate and makes the lookups; checks nothing."""
        layers = {layer: rows.to(model.devices[layer]) for layer, rows in memory.layers.items()}
        return cls(memory, model, make_lookups(layers, model.routers, options), options)

    def with_confidences(
        self, confidences: Mapping[int, Confidence], memory: RoutingMemory | None = None
    ) -> "AttachedMemory":
        """
        The same rows and engines under other confidences, which costs nothing.

        Args:
            confidences: `{layer: confidence}`; layers that are not in it are left out.
            memory: what the result is a preparation of; this one's if None.
        """
        lookups = {layer: self[layer].with_confidence(one) for layer, one in confidences.items()}
        return AttachedMemory(memory if memory is not None else self.memory, self.model, lookups, self.options)

    def with_rows_of(self, memory: RoutingMemory) -> "AttachedMemory":
        """Other rows for the same model, under the same options; neither fingerprint nor probe runs again."""
        return AttachedMemory.of(memory, self.model, self.options)

    def __deepcopy__(self, memo: dict) -> "AttachedMemory":
        # a copied model shares the memory and its tables, as it would share a file
        lookups = {layer: copy.copy(lookup) for layer, lookup in self.items()}
        twin = AttachedMemory(self.memory, self.model, lookups, self.options)
        twin.owner = self.owner
        memo[id(self)] = twin
        return twin

    def __reduce__(self):
        return AttachedMemory, (self.memory, self.model, dict(self), self.options)


def prepare(model: nn.Module, memory: RoutingMemory, options: RetrievalOptions | None = None) -> AttachedMemory:
    """
    Checks that a memory belongs to a model and makes its lookups; puts nothing in force.

    Args:
        model, memory: see `attach_memory`.
        options: how to search and mix; those of `memory.config` if None.

    Raises:
        UnsupportedModelError: if an override on the gates would not decide the routing.
        MemoryMismatchError: if the memory belongs to another model; the model is untouched then.
    """
    if not isinstance(memory, RoutingMemory):
        raise TypeError(f"{shown(memory)} is no RoutingMemory: open one with RoutingMemory.from_pretrained.")
    memory.check_config()
    memory.check_model(model)
    warn_if_slow(model)
    if options is None:
        options = memory.config.retrieval_options()
    return AttachedMemory.of(memory, probe_model(model), options)


def attach_memory(model: nn.Module, memory: RoutingMemory, name: str = "default") -> None:
    """
    Attaches a memory and puts it in force; the model's weights, class and forward stay as they are.

    What the memory does is decided by its `config` as it is now; later changes of `memory.config` have no effect until
    the memory is attached again.

    Args:
        model: an OLMoE, Qwen3-MoE or GPT-OSS of transformers, plain or PEFT-wrapped, in any float dtype. Each layer's
            rows are put on the device where that layer's gate runs; a model that is moved needs its memory attached
            again.
        memory: one that was built for this model.
        name: for `set_memory` and `detach_memory`; other memories may already be attached under other names.

    Raises:
        UnsupportedModelError: if a hook on the gates would not decide the routing.
        MemoryMismatchError: if the memory belongs to another model; the model is untouched then.
        ValueError: if the name is taken.
    """
    _check_name(model, name)
    attach_prepared(model, prepare(model, memory), name)


def attach_prepared(model: nn.Module, prepared: AttachedMemory, name: str) -> None:
    """`attach_memory` of a memory that was prepared for this model."""
    if not prepared:
        logger.warning("the memory %r has no rows: the model routes as if it were not attached", name)
    _put_in_force(model, prepared, name)


def attach_override(model: nn.Module, overrides: Mapping[int, RoutingOverride], name: str = "default") -> None:
    """
    Attaches routing overrides that are no memory, and puts them in force.

    `set_memory`, `disable_memory`, `active_memory` and `detach_memory` treat them like a memory of that name.

    Args:
        model: as in `attach_memory`.
        overrides: `{decoder layer: override}`. An override is called as `override(x, output, tokens)` with the gate's
            input (T, d), its output (logits (T, E), expert weights (T, k), expert ids (T, k)) and the call's
            `knnmoe_hf.lookup.sequence.Tokens`; it returns such an output, or None to keep the gate's own.
        name: as in `attach_memory`.

    Raises:
        UnsupportedModelError: if a hook on the gates would not decide the routing.
        TypeError: for an override that cannot be called.
        ValueError: if the name is taken, or a layer has no gate.
    """
    _check_name(model, name)
    if not isinstance(overrides, Mapping) or not all(callable(override) for override in overrides.values()):
        raise TypeError(f"{shown(overrides)} are no overrides: give a dict {{decoder layer: callable}}.")
    present = [gate.layer for gate in probe_model(model).gates]
    if missing := [layer for layer in overrides if layer not in present]:
        raise ValueError(f"layer {shown(missing[0])} has no gate: choose among {shown(present)}.")
    _put_in_force(model, Overrides(overrides), name)


def detach_memory(model: nn.Module, name: str | None = None) -> None:
    """
    Takes a memory, or an override, off the model, or all of them; with the last one every hook goes.

    Args:
        model: the model.
        name: under which it was attached; None for all.

    Raises:
        ValueError: if nothing is attached under this name.
    """
    hooks = _attached(model, name)
    for gone in list(hooks.named) if name is None else [name]:
        del hooks.named[gone]
    if hooks.active not in hooks.named:
        hooks.active = None
    hooks.select()
    hooks.remove_if_unused(model)


def set_memory(model: nn.Module, name: str) -> None:
    """
    Puts the memory, or override, attached under this name in force, instead of the one that was.

    Raises:
        ValueError: if nothing is attached under this name.
    """
    hooks = _attached(model, name)
    hooks.active = name
    hooks.select()


def active_memory(model: nn.Module) -> str | None:
    """Name of the memory, or override, in force; None if there is none or it is disabled."""
    hooks = RoutingHooks.of(model)
    return None if hooks is None or hooks.disabled else hooks.active


def get_memory(model: nn.Module, name: str | None = None) -> RoutingMemory:
    """
    The memory attached under this name, by default the one that `set_memory` chose.

    Raises:
        ValueError: if there is none.
    """
    hooks = _attached(model, name)
    name = hooks.active if name is None else name
    if name is None:
        raise ValueError(f"no memory is in force: call set_memory with one of {shown(list(hooks.named))}.")
    return _as_memory(hooks, name).memory


@contextmanager
def disable_memory(model: nn.Module) -> Iterator[None]:
    """
    Inside, the model is bit-exactly the base model; contexts nest.

    On a model without a memory it does nothing, and a memory that is attached inside is in force.
    """
    hooks = RoutingHooks.of(model)
    with hooks.suspended() if hooks is not None else nullcontext():
        yield


@contextmanager
def watch_lookups(model: nn.Module, observer: LookupObserver) -> Iterator[None]:
    """
    Calls `observer(event)` with a `knnmoe_hf.lookup.events.LookupEvent` for every lookup of the memory in force.

    Several observers may watch at once, and none changes what is computed; outside of the context nothing is called.

    Raises:
        ValueError: if no memory is in force.
    """
    hooks = _attached(model, None)
    if hooks.active is None:
        raise ValueError(f"no memory is in force: call set_memory with one of {shown(list(hooks.named))}.")
    lookups = list(_as_memory(hooks, hooks.active).values())
    for lookup in lookups:
        lookup.observers.append(observer)
    try:
        yield
    finally:
        for lookup in lookups:
            lookup.observers.remove(observer)


def _as_memory(hooks: RoutingHooks, name: str) -> AttachedMemory:
    found = hooks.named[name]
    if not isinstance(found, AttachedMemory):
        memories = [other for other, overrides in hooks.named.items() if isinstance(overrides, AttachedMemory)]
        raise ValueError(f"{shown(name)} is a routing override, not a memory: choose among {shown(memories)}.")
    return found


def _check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{shown(name)} is no name of a memory: use a string.")
    hooks = RoutingHooks.of(model)
    if hooks is not None and name in hooks.named:
        raise ValueError(f"a memory named {shown(name)} is already attached: detach it or choose another name.")


def _put_in_force(model: nn.Module, overrides: Overrides, name: str) -> None:
    hooks = RoutingHooks.of(model)
    if hooks is None:
        hooks = RoutingHooks(model)
    hooks.named[name] = overrides
    hooks.active = name
    hooks.select()


def _attached(model: nn.Module, name: str | None) -> RoutingHooks:
    hooks = RoutingHooks.of(model)
    if hooks is None or not hooks.named:
        raise ValueError(f"no memory is attached to this {type(model).__name__}: call attach_memory first.")
    if name is not None and name not in hooks.named:
        raise ValueError(f"no memory named {shown(name)} is attached: choose among {shown(list(hooks.named))}.")
    return hooks
