"""
Which overrides are in force for the calling thread or asyncio task: the contexts that are open there.

What is in force for a model's hooks is read as an attribute of this module, `getattr(in_force, hooks.key)`:
torch.compile cannot trace the reading of a context variable, but it can guard an attribute of a module, which it reads
anew before each call of a compiled graph, in the thread that calls it.
"""

import itertools
import sys
import threading
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from knnmoe_hf.models.calls import Overrides

if TYPE_CHECKING:
    from knnmoe_hf.models.hooks import RoutingHooks

lock = threading.RLock()
"""Held while hooks are put on a model or removed, and while it is counted who needs them."""

NONE = Overrides({})
"""In force where no override is."""


class Context:
    """
    An open context on one model.

    Attributes:
        hooks: of the model; None as long as it has no hooks.
        model: the model, as long as it has no hooks; then None.
        ended: whether it was ended by another thread or task than the one where it is open.
        began: tells, of the thread or task that ends it, whether it began there.
    """

    def __init__(self, hooks: "RoutingHooks | None", model: nn.Module | None = None):
        self.hooks, self.model, self.ended = hooks, None if hooks is not None else model, False
        self.began: Token | None = None


class Choice(NamedTuple):
    """
    What is in force inside a context.

    Attributes:
        overrides: those in force.
        name: under which they are attached; None if they are not, or if there are none.
        is_off: whether it is a context of `disable_memory`.
        is_fixed: whether `set_memory` and `detach_memory` leave it as it is: a generation, a build.
    """

    context: Context
    overrides: Overrides
    name: str | None = None
    is_off: bool = False
    is_fixed: bool = False


# a tuple that is replaced, never changed: a task or thread that started with a copy of the context keeps what it got
_open: ContextVar[tuple[Choice, ...]] = ContextVar("knnmoe_hf_open_contexts", default=())
_began_here: ContextVar[None] = ContextVar("knnmoe_hf_began_here", default=None)
_numbers = itertools.count()
_hooks_by_key: WeakValueDictionary[str, Any] = WeakValueDictionary()
_without_hooks: WeakSet[Context] = WeakSet()


def register(hooks: "RoutingHooks") -> str:
    """A key for hooks, by which `getattr(in_force, key)` gives the overrides that are in force for them."""
    key = f"for_hooks_{next(_numbers)}"
    _hooks_by_key[key] = hooks
    return key


def __getattr__(key: str) -> Overrides:
    """The overrides in force for the calling thread or task."""
    hooks = _hooks_by_key.get(key)
    if hooks is None:
        raise AttributeError(f"module {__name__!r} has no attribute {key!r}")
    found = choices(hooks)
    return found[0].overrides if found else hooks.default


def choices(hooks: "RoutingHooks") -> list[Choice]:
    """The choices of the contexts on one model that are open here, the innermost first: that one decides."""
    return [one for one in reversed(_open.get()) if one.context.hooks is hooks and not one.context.ended]


def begin(choice: Choice) -> None:
    """Opens a context in the calling thread or task; `lock` is held."""
    context = choice.context
    if context.hooks is None:
        _without_hooks.add(context)
    else:
        context.hooks.users += 1
    context.began = _began_here.set(None)
    _open.set((*(one for one in _open.get() if not one.context.ended), choice))


def end(context: Context) -> None:
    """Ends a context, in whatever order contexts end, and also from another thread or task than it began in."""
    _open.set(tuple(one for one in _open.get() if one.context is not context))
    try:
        _began_here.reset(context.began)
    except (
        ValueError
    ):  # a generator that holds it open was closed in another thread or task, which may have inherited it
        context.ended = True
    context.began = None  # it refers to all that is in force where it began
    with lock:
        _without_hooks.discard(context)
        if context.hooks is not None:
            context.hooks.users -= 1
            context.hooks.remove_if_unused()


def change(old: Choice, new: Choice) -> None:
    """Replaces a choice in the calling thread or task; others where the same context is open keep theirs."""
    _open.set(tuple(new if one is old else one for one in _open.get()))


def take_effect(hooks: "RoutingHooks", decoder: nn.Module) -> None:
    """
    To be called when hooks are put on a model, with `lock` held: contexts that began before now have effect on them.

    A context of `disable_memory` in the calling thread or task has none: what is attached inside is in force at once.
    """
    here = {id(one.context) for one in _open.get() if one.is_off}
    for context in list(_without_hooks):
        if id(context) not in here and any(module is decoder for module in context.model.modules()):
            _without_hooks.discard(context)
            context.hooks, context.model = hooks, None
            hooks.users += 1


def forget_compiled_graphs(model: nn.Module) -> None:
    """
    Drops the graphs of torch.compile when hooks are put on a model, or removed from it; without `lock`, which
    a thread that compiles may wait for.

    A compiled graph does not check the hook lists again: it would go on without the new hooks, or with the removed
    ones. While the hooks stay, the graph's own guards notice which overrides are in force.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "_compiled_call", None) is not None:
            del module._compiled_call  # `generate` stores its compiled forward here, and makes one if there is none
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
