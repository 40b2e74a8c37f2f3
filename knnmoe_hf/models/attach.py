"""Attaching memories and other routing overrides to a model by name; one name at a time is in force.

Preparing a memory (checking its fingerprint, probing the model, building search engines) happens once, when it is
attached. Choosing which name is in force only sets a reference. After the last detach no hook is left on the model.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

from torch import nn

from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.confidence import Confidence
from knnmoe_hf.lookup.events import LookupObserver
from knnmoe_hf.lookup.make import make_confidences, make_lookups
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.torch_lookup import TorchLookup
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.calls import Overrides, RoutingOverride
from knnmoe_hf.models.hooks import RoutingHooks, hooked
from knnmoe_hf.models.owners import owner_of
from knnmoe_hf.models.precision import warn_if_slow
from knnmoe_hf.models.probe import ProbedModel, probe_model

logger = logging.getLogger(__name__)


class AttachedMemory(Overrides):
    """
    A memory prepared for a model: one lookup for each of its layers, with a frozen snapshot of its options.

    Attributes:
        memory: the memory that was prepared. Changing its `config` afterwards has no effect here.
        model: gates and devices of the model, as probed.
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
        self.owner = owner_of(lookups, options)

    @classmethod
    def of(cls, memory: RoutingMemory, model: ProbedModel, options: RetrievalOptions) -> "AttachedMemory":
        """Moves each layer's rows to the device of its gate and makes the lookups, without checking that they fit."""
        layers = {layer: rows.to(model.devices[layer]) for layer, rows in memory.layers.items()}
        return cls(memory, model, make_lookups(layers, model.routers, options), options)

    def with_confidences(self, confidences: Mapping[int, Confidence]) -> "AttachedMemory":
        """
        The same rows and engines with other confidences, `{layer: confidence}`; the result has only these layers.

        Neither rows nor engines are copied or rebuilt.
        """
        lookups = {layer: self[layer].with_confidence(one, self.options) for layer, one in confidences.items()}
        return AttachedMemory(self.memory, self.model, lookups, self.options)

    def with_options(self, options: RetrievalOptions, memory: RoutingMemory | None = None) -> "AttachedMemory":
        """
        The same rows and engines with the confidence that other options name.

        Args:
            options: may differ from `self.options` in `confidence` and in its thresholds.
            memory: `memory` of the result, whose layers and calibration statistics it takes; the same as here if None.
        """
        memory = memory if memory is not None else self.memory
        kept = {layer: rows for layer, rows in memory.layers.items() if layer in self}
        confidences = make_confidences(kept, options)
        lookups = {layer: self[layer].with_confidence(one, options) for layer, one in confidences.items()}
        return AttachedMemory(memory, self.model, lookups, options)

    def with_rows_of(self, memory: RoutingMemory) -> "AttachedMemory":
        """Another memory for the same model, with the same options; neither fingerprint nor probe runs again."""
        return AttachedMemory.of(memory, self.model, self.options)

    def __deepcopy__(self, memo: dict) -> "AttachedMemory":
        # a copied model shares the memory's tensors instead of copying them
        lookups = {layer: copy.copy(lookup) for layer, lookup in self.items()}
        twin = AttachedMemory(self.memory, self.model, lookups, self.options)
        twin.owner = self.owner
        memo[id(self)] = twin
        return twin

    def __reduce__(self):
        return AttachedMemory, (self.memory, self.model, dict(self), self.options)


def prepare(model: nn.Module, memory: RoutingMemory, options: RetrievalOptions | None = None) -> AttachedMemory:
    """
    Checks that a memory belongs to a model and makes its lookups, without attaching it.

    Args:
        model, memory: see `attach_memory`.
        options: of retrieval and mixing; those of `memory.config` if None.

    Raises:
        TypeError: for anything but a `RoutingMemory`.
        UnsupportedModelError: if an override on the gates would not decide the routing.
        MemoryMismatchError: if the memory belongs to another model; the model is untouched then.
    """
    if not isinstance(memory, RoutingMemory):
        raise TypeError(f"{shown(memory)} is not a RoutingMemory: open one with RoutingMemory.from_pretrained.")
    memory.check_config()
    memory.check_model(model)
    warn_if_slow(model)
    if options is None:
        options = memory.config.retrieval_options()
    return AttachedMemory.of(memory, probe_model(model), options)


def attach_memory(model: nn.Module, memory: RoutingMemory, name: str = "default") -> None:
    """
    Attaches a memory and puts it in force; the model's weights, class and forward stay as they are.

    The options are copied from `memory.config` now; later changes of `memory.config` have no effect until the memory
    is attached again.

    Args:
        model: an OLMoE, Qwen3-MoE or GPT-OSS of transformers, plain or PEFT-wrapped, in any float dtype. Each layer's
            rows are put on the device where that layer's gate runs; a model that is moved needs its memory attached
            again.
        memory: one that was built for this model.
        name: for `set_memory` and `detach_memory`; other memories may already be attached under other names.

    Raises:
        TypeError: for anything but a `RoutingMemory`, or a name that is no string.
        UnsupportedModelError: if a hook on the gates would not decide the routing.
        MemoryMismatchError: if the memory belongs to another model; the model is untouched then.
        ValueError: if the name is taken.
    """
    _check_name(model, name)
    with hooked(model):
        attach_prepared(model, prepare(model, memory), name)


def attach_prepared(model: nn.Module, prepared: AttachedMemory, name: str) -> None:
    """As `attach_memory`, for a memory that `prepare` made ready for this model."""
    if not prepared:
        logger.warning("the memory %r has no rows: the model routes as if it were not attached", name)
    _put_in_force(model, prepared, name)


def attach_override(model: nn.Module, overrides: Mapping[int, RoutingOverride], name: str = "default") -> None:
    """
    Attaches routing overrides other than a memory, and puts them in force.

    `set_memory`, `disable_memory`, `active_memory` and `detach_memory` treat them like a memory of that name.

    Args:
        model: as in `attach_memory`.
        overrides: `{decoder layer: override}`. An override is called as `override(x, output, tokens)` with the gate's
            input (T, d), its output (logits (T, E), expert weights (T, k), expert ids (T, k)) and the call's
            `knnmoe_hf.lookup.sequence.Tokens`; it returns such an output (expert ids from 0 to E - 1, of which there
            may be more or fewer than the gate chooses), or None to keep the gate's own, which it must not change in
            place. The forward raises TypeError if the shapes do not fit.
        name: as in `attach_memory`.

    Raises:
        UnsupportedModelError: if a hook on the gates would not decide the routing.
        TypeError: for an override that cannot be called, or a name that is no string.
        ValueError: if the name is taken, or a layer has no gate.
    """
    _check_name(model, name)
    if not isinstance(overrides, Mapping) or not all(callable(override) for override in overrides.values()):
        raise TypeError(f"{shown(overrides)} are not routing overrides: give a dict {{decoder layer: callable}}.")
    warn_if_slow(model)
    with hooked(model):
        present = [gate.layer for gate in probe_model(model).gates]
        if missing := [layer for layer in overrides if layer not in present]:
            raise ValueError(f"layer {shown(missing[0])} has no gate: choose among {shown(present)}.")
        _put_in_force(model, Overrides(overrides), name)


def detach_memory(model: nn.Module, name: str | None = None) -> None:
    """
    Detaches the memory or override of this name, or all of them; with the last one, every hook is removed.

    Args:
        model: the model.
        name: the name given at attach; None detaches all.

    Raises:
        ValueError: if nothing is attached under this name.
    """
    hooks = _attached(model, name)
    for detached in list(hooks.named) if name is None else [name]:
        del hooks.named[detached]
    if hooks.active not in hooks.named:
        hooks.active = None
    hooks.select()
    hooks.remove_if_unused(model)


def set_memory(model: nn.Module, name: str) -> None:
    """
    Puts the memory or override of this name in force, in place of the previous one.

    Raises:
        ValueError: if nothing is attached under this name.
    """
    hooks = _attached(model, name)
    hooks.active = name
    hooks.select()


def active_memory(model: nn.Module) -> str | None:
    """Name of the memory or override in force; None if there is none, or inside `disable_memory`."""
    hooks = RoutingHooks.of(model)
    return None if hooks is None or hooks.disabled else hooks.active


def get_memory(model: nn.Module, name: str | None = None) -> RoutingMemory:
    """
    The memory attached under this name; by default the last one attached or chosen by `set_memory`.

    Raises:
        ValueError: if there is none, or if the name belongs to an override that is not a memory.
    """
    hooks = _attached(model, name)
    name = hooks.active if name is None else name
    if name is None:
        raise ValueError(f"no memory is in force: call set_memory with one of {shown(list(hooks.named))}.")
    return _as_memory(hooks, name).memory


@contextmanager
def disable_memory(model: nn.Module) -> Iterator[None]:
    """
    Inside this context the model computes exactly, bit for bit, what the base model does; contexts nest.

    On a model without a memory the context does nothing: a memory that is attached inside is in force at once.
    """
    hooks = RoutingHooks.of(model)
    with hooks.suspended() if hooks is not None else nullcontext():
        yield


@contextmanager
def watch_lookups(model: nn.Module, observer: LookupObserver) -> Iterator[None]:
    """
    Inside this context, `observer(event)` is called with a `knnmoe_hf.lookup.events.LookupEvent` for every lookup of
    the memory in force, also after `set_memory`; memories that are attached inside the context are not watched.

    Contexts nest, each with its own observer; observers do not change what the model computes.

    Raises:
        ValueError: if no memory is in force.
    """
    hooks = _attached(model, None)
    if hooks.active is None:
        raise ValueError(f"no memory is in force: call set_memory with one of {shown(list(hooks.named))}.")
    _as_memory(hooks, hooks.active)
    memories = [overrides for overrides in hooks.named.values() if isinstance(overrides, AttachedMemory)]
    lookups = [lookup for memory in memories for lookup in memory.values()]
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
        way_out = f"choose among {shown(memories)}" if memories else "attach one with attach_memory"
        raise ValueError(f"{shown(name)} is a routing override, not a memory: {way_out}.")
    return found


def _check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{shown(name)} is not the name of a memory: use a string.")
    hooks = RoutingHooks.of(model)
    if hooks is not None and name in hooks.named:
        raise ValueError(f"{shown(name)} is already attached: call detach_memory with this name, or choose another.")


def _put_in_force(model: nn.Module, overrides: Overrides, name: str) -> None:
    with hooked(model) as hooks:
        hooks.named[name] = overrides
        overrides.owner.name = name
        hooks.active = name
        hooks.select()


def _attached(model: nn.Module, name: str | None) -> RoutingHooks:
    hooks = RoutingHooks.of(model)
    if hooks is None or not hooks.named:
        raise ValueError(f"no memory is attached to this {type(model).__name__}: call attach_memory first.")
    if name is not None and name not in hooks.named:
        raise ValueError(f"no memory named {shown(name)} is attached: choose among {shown(list(hooks.named))}.")
    return hooks
