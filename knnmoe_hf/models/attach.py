"""Attaching memories and other routing overrides to a model by name; one name at a time is in force.

Preparing a memory (checking its fingerprint, probing the model, building search engines) happens once, when it is
attached. Choosing which name is in force only sets a reference. After the last detach no hook is left on the model.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.events import LookupObserver
from knnmoe_hf.lookup.observers import watching
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models import in_force
from knnmoe_hf.models.calls import Overrides, RoutingOverride
from knnmoe_hf.models.hooks import RoutingHooks, hooked, opened, remove_unused_hooks
from knnmoe_hf.models.logits_probe import probe_for
from knnmoe_hf.models.precision import warn_if_slow
from knnmoe_hf.models.prepared import AttachedMemory
from knnmoe_hf.models.probe import probe_model

logger = logging.getLogger(__name__)


def prepare(model: nn.Module, memory: RoutingMemory, options: RetrievalOptions | None = None) -> AttachedMemory:
    """
    Checks that a memory belongs to a model and makes its lookups, without attaching it.

    Args:
        model, memory: see `attach_memory`.
        options: of retrieval and mixing; those of `memory.config` if None.

    Raises:
        TypeError: for anything but a `RoutingMemory`.
        UnsupportedModelError: if an override on the gates would not decide the routing.
        MemoryMismatchError: if the memory belongs to another model, or has no next tokens where `recall` needs them;
            the model is untouched then.
    """
    if not isinstance(memory, RoutingMemory):
        raise TypeError(f"{shown(memory)} is not a RoutingMemory: open one with RoutingMemory.from_pretrained.")
    memory.check_config()
    memory.check_model(model)
    warn_if_slow(model)
    if options is None:
        options = memory.config.retrieval_options()
    memory.check_recall(options.recall)
    return AttachedMemory.of(memory, probe_for(model, memory, options.recall), options)


def attach_memory(model: nn.Module, memory: RoutingMemory, name: str = "default") -> None:
    """
    Attaches a memory and puts it in force; the model's weights, class and forward stay as they are.

    The options are copied from `memory.config` now; later changes of `memory.config` have no effect until the memory
    is attached again.

    Args:
        model: of a supported MoE family of transformers, plain or PEFT-wrapped, in any float dtype. Each layer's
            rows are put on the device where that layer's gate runs; a model that is moved needs its memory attached
            again.
        memory: one that was built for this model.
        name: for `set_memory`, `use_memory` and `detach_memory`; other memories may already be attached under other
            names. It is put in force as by `set_memory`.

    Raises:
        TypeError: for anything but a `RoutingMemory`, or a name that is not a string.
        UnsupportedModelError: if a hook on the gates would not decide the routing.
        MemoryMismatchError: if the memory belongs to another model, or has no next tokens where `recall` needs them;
            the model is untouched then.
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

    `set_memory`, `use_memory`, `disable_memory`, `active_memory` and `detach_memory` treat them like a memory of that
    name.

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
        TypeError: for an override that cannot be called, or a name that is not a string.
        ValueError: if the name is taken, or a layer has no gate.
    """
    _check_name(model, name)
    if not isinstance(overrides, Mapping) or not all(callable(override) for override in overrides.values()):
        raise TypeError(f"{shown(overrides)} are not routing overrides: give a dict {{decoder layer: callable}}.")
    warn_if_slow(model)
    with hooked(model):
        present = list(probe_model(model).routers)
        if missing := [layer for layer in overrides if layer not in present]:
            raise ValueError(f"layer {shown(missing[0])} has no gate: choose among {shown(present)}.")
        _put_in_force(model, Overrides(overrides), name)


def detach_memory(model: nn.Module, name: str | None = None) -> None:
    """
    Detaches the memory or override of this name, or all of them; with the last one, every hook is removed.

    Forwards and generations that run at that time, in whatever thread, end with what they began with, and so do open
    `use_memory` contexts of other threads and asyncio tasks; the hooks are removed when the last of them has ended.

    Args:
        model: the model.
        name: the name given at attach; None detaches all.

    Raises:
        TypeError: for a name that is not a string.
        ValueError: if nothing is attached under this name.
    """
    with in_force.lock:
        hooks = _attached(model, name)
        hooks.detach(list(hooks.named) if name is None else [name])
    remove_unused_hooks(model, hooks)


def set_memory(model: nn.Module, name: str) -> None:
    """
    Puts the memory or override of this name in force, in place of the previous one.

    Outside of any context this is the default of the whole process: it is in force in every thread and asyncio task
    that is in no context of its own. Inside `use_memory` it is in force until that context ends, for the calling
    thread or task alone. Inside `disable_memory` nothing is in force: there it changes what the `use_memory` context
    around it, if any, goes on with, and otherwise it has no effect, as a warning says. Forwards and generations that
    are running are not changed.

    Raises:
        TypeError: for a name that is not a string.
        ValueError: if nothing is attached under this name.
    """
    _check_is_name(name)
    with in_force.lock:
        _attached(model, name).choose(name)


@contextmanager
def use_memory(model: nn.Module, name: str | None) -> Iterator[None]:
    """
    Inside this context the memory or override of this name is in force, for the calling thread or asyncio task alone.

    Contexts nest; the innermost decides. A task that is started inside the context, and `asyncio.to_thread`, inherit
    it, as they inherit every context variable; a new thread, also one of a pool, does not. What is in force here stays
    so when another thread or task detaches it.

    Args:
        model: the model.
        name: the name given at attach; None is `disable_memory`.

    Raises:
        TypeError: for a name that is not a string.
        ValueError: if nothing is attached under this name.
    """
    if name is None:
        with disable_memory(model):
            yield
        return
    with ExitStack() as stack:
        with in_force.lock:
            hooks = _attached(model, name)
            stack.enter_context(opened(in_force.Choice(in_force.Context(hooks), hooks.named[name], name)))
        yield


@contextmanager
def disable_memory(model: nn.Module) -> Iterator[None]:
    """
    Inside this context the model computes exactly, bit for bit, what the base model does, for the calling thread or
    asyncio task alone (see `use_memory`); contexts nest, and the innermost decides.

    On a model without a memory the context does nothing: a memory that is attached inside is in force at once.
    """
    with ExitStack() as stack:
        with in_force.lock:
            context = in_force.Context(RoutingHooks.of(model), model)
            stack.enter_context(opened(in_force.Choice(context, in_force.NONE, is_off=True)))
        yield


def active_memory(model: nn.Module) -> str | None:
    """Name of what is in force for the calling thread or task; None if nothing is, as inside `disable_memory`."""
    hooks = RoutingHooks.of(model)
    return None if hooks is None else hooks.current_name


def get_memory(model: nn.Module, name: str | None = None) -> RoutingMemory:
    """
    The memory attached under this name; by default the one that is in force for the calling thread or task, or would
    be outside of `disable_memory`.

    Raises:
        TypeError: for a name that is not a string.
        ValueError: if there is none, or if the name belongs to an override that is not a memory.
    """
    if name is None:
        return attached_memory(model)[1].memory
    hooks = _attached(model, name)
    return _as_memory(hooks, name, hooks.named[name]).memory


def attached_memory(model: nn.Module) -> tuple[str, AttachedMemory]:
    """Name and memory that `get_memory` means if it is given no name, with its lookups; raises as that does."""
    hooks = _attached(model, None)
    name, chosen = _chosen(hooks)
    return name, _as_memory(hooks, name, chosen)


@contextmanager
def watch_lookups(model: nn.Module, observer: LookupObserver) -> Iterator[None]:
    """
    Inside this context, `observer(event)` is called with a `knnmoe_hf.lookup.events.LookupEvent` for every lookup that
    the calling thread or asyncio task makes with a memory of this model, also after `set_memory`; memories that are
    attached inside the context are not watched.

    Contexts nest, each with its own observer; observers do not change what the model computes. What other threads ask
    of the model is not observed; a task started inside, and `asyncio.to_thread`, are.

    Raises:
        ValueError: if no memory is in force.
    """
    memories = [attached_memory(model)[1], *list(_attached(model, None).named.values())]
    lookups = [lookup for memory in memories if isinstance(memory, AttachedMemory) for lookup in memory.values()]
    with watching(lookups, observer):
        yield


def _chosen(hooks: RoutingHooks) -> tuple[str, Overrides]:
    """Name and overrides in force here, or that would be outside of `disable_memory`."""
    for choice in in_force.choices(hooks):
        if choice.name is not None:
            return choice.name, choice.overrides
    if hooks.active is None:
        raise ValueError(f"no memory is in force: call set_memory with one of {shown(list(hooks.named))}.")
    return hooks.active, hooks.default


def _as_memory(hooks: RoutingHooks, name: str, found: Overrides) -> AttachedMemory:
    if not isinstance(found, AttachedMemory):
        memories = [other for other, overrides in hooks.named.items() if isinstance(overrides, AttachedMemory)]
        way_out = f"choose among {shown(memories)}" if memories else "attach one with attach_memory"
        raise ValueError(f"{shown(name)} is a routing override, not a memory: {way_out}.")
    return found


def _check_is_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{shown(name)} is not the name of a memory: use a string.")


def _check_name(model: nn.Module, name: str) -> None:
    _check_is_name(name)
    hooks = RoutingHooks.of(model)
    if hooks is not None and name in hooks.named:
        raise ValueError(f"{shown(name)} is already attached: call detach_memory with this name, or choose another.")


def _put_in_force(model: nn.Module, overrides: Overrides, name: str) -> None:
    with hooked(model) as hooks, in_force.lock:
        _check_name(model, name)  # another thread may have taken it since
        hooks.named[name] = overrides
        overrides.owner.name = name
        hooks.choose(name)


def _attached(model: nn.Module, name: str | None) -> RoutingHooks:
    hooks = RoutingHooks.of(model)
    # another thread may have detached what is in force here
    if hooks is None or not (hooks.named or (name is None and hooks.current_name)):
        raise ValueError(f"no memory is attached to this {type(model).__name__}: call attach_memory first.")
    if name is None:
        return hooks
    _check_is_name(name)
    if name not in hooks.named:
        raise ValueError(f"no memory named {shown(name)} is attached: choose among {shown(list(hooks.named))}.")
    return hooks
