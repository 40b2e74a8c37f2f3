"""
Keeps what is in force fixed for the length of a generation.

`generate` of transformers runs many forwards, and continuous batching runs them in a thread of its own. Their methods
are wrapped once, in transformers' own classes: what is in force for the caller when a generation begins stays in force
for it until it ends. Models without a memory generate as before.
"""

import functools
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # this module is loaded as soon as transformers has defined `generate`, before its models
    from knnmoe_hf.models.calls import Overrides

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_knnmoe_session"  # of a manager of continuous batching


class _Session(NamedTuple):
    """How a manager of continuous batching runs."""

    overrides: "Overrides"
    name: str | None
    context: Context | None = None  # a copy of that of the thread that started it; the loop runs in it
    fixing: AbstractContextManager | None = None  # open in `context`: keeps the overrides in force there


def wrap_generations(mixin: type) -> None:
    """Wraps the methods by which generations begin: of transformers' `GenerationMixin`, and of continuous batching."""
    _wrap(mixin, "generate", _generate)
    _wrap(mixin, "generate_batch", _generate)
    manager = sys.modules["transformers.generation.continuous_batching.continuous_api"].ContinuousBatchingManager
    _wrap(manager, "warmup", _warm_up)
    _wrap(manager, "start", _start)
    _wrap(manager, "_run_generation_loop", _run_generation_loop)
    _wrap(manager, "add_request", _add_request)


def _wrap(owner: type, name: str, around: Callable) -> None:
    method = getattr(owner, name, None)
    if method is None:
        logger.warning(
            "this version of transformers has no %s.%s: switch memories only while nothing generates",
            *(owner.__name__, name),
        )
        return

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        return around(method, self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _generate(generate: Callable, model, *args, **kwargs):
    from torch import nn

    from knnmoe_hf.models.hooks import fixed

    models = [model, *(given for given in (*args, *kwargs.values()) if isinstance(given, nn.Module))]  # an assistant
    with ExitStack() as stack:
        for one in models:
            stack.enter_context(fixed(one))
        return generate(model, *args, **kwargs)


def _warm_up(warm_up: Callable, manager):
    _begin_session(manager)
    return warm_up(manager)


def _start(start: Callable, manager):
    from knnmoe_hf.models.hooks import fixed

    if not manager.is_running():
        _begin_session(manager)
        context, fixing = copy_context(), fixed(manager.model)
        context.run(fixing.__enter__)
        setattr(manager, _ATTRIBUTE, getattr(manager, _ATTRIBUTE)._replace(context=context, fixing=fixing))
    return start(manager)


def _begin_session(manager) -> None:
    from knnmoe_hf.models.hooks import in_force_for

    overrides, name = in_force_for(manager.model)
    before = getattr(manager, _ATTRIBUTE, None)
    if before is not None and before.overrides is not overrides:
        # its CUDA graphs, and the keys and values that it shares among requests, are those of another memory
        manager.batch_processor, manager.warmed_up = None, False
    setattr(manager, _ATTRIBUTE, _Session(overrides, name))


def _run_generation_loop(run: Callable, manager) -> None:
    session = getattr(manager, _ATTRIBUTE)
    try:
        session.context.run(run, manager)
    finally:
        session.context.run(session.fixing.__exit__, None, None, None)


def _add_request(add_request: Callable, manager, *args, **kwargs):
    from knnmoe_hf.models.hooks import in_force_for

    overrides, name = in_force_for(manager.model)
    session = getattr(manager, _ATTRIBUTE, None)
    if session is not None and session.fixing is not None and session.overrides is not overrides:
        raise ValueError(
            f"{_in_words(name)} is in force where this request is added, but the manager was started with "
            f"{_in_words(session.name)} and goes on with it: add the request where that is in force, or start another "
            "manager here."
        )
    return add_request(manager, *args, **kwargs)


def _in_words(name: str | None) -> str:
    return "no memory" if name is None else f"the memory {name!r}"
