"""Hooks on a model: for each gate they call the routing override in force, with the gate's input and output.

An override is a memory's lookup, the trainable logits of a builder, or a function of the user; this module treats all
of them alike. They are stored in the hooks themselves, in the model's own hook lists: a copied model has copies of
them, and a model whose last override was detached has none.
"""

import logging
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from knnmoe_hf.models import in_force
from knnmoe_hf.models.calls import CallTokens, Overrides, keep_state
from knnmoe_hf.models.gate_hook import (
    TOKENS,
    Call,
    GateHook,
    check_routed,
    current_layer,
    forget_interrupted_forward,
    takes_any_keyword,
    without_tokens,
)
from knnmoe_hf.models.gates import decoder_layers, find_decoder, find_gates
from knnmoe_hf.models.logits_hook import LogitsHooks, find_language_model, tokens_arrived
from knnmoe_hf.models.predecessors import named_arguments
from knnmoe_hf.models.saving import SavingHint

logger = logging.getLogger(__name__)


class RoutingHooks:
    """
    All hooks of one model, and its overrides by name; those of one name are in force, or none.

    Args:
        model: a supported model, plain, PEFT-wrapped or compiled.

    Raises:
        UnsupportedModelError: if the model has no gate of a supported family.

    Attributes:
        named: `{name: overrides}`.
        active: name that is in force where no context is open (see `in_force`); None if that name was detached.
        default: the overrides of that name.
        users: number of open contexts, which keep the hooks on the model even if `named` is empty.
        key: for `in_force`.
    """

    def __init__(self, model: nn.Module):
        gates = find_gates(model)
        self.named: dict[str, Overrides] = {}
        self.active: str | None = None
        self.default: Overrides = in_force.NONE
        self.users = 0
        self._running: set[weakref.ref] = set()  # calls that layers may still run for
        self.key = in_force.register(self)
        decoder = find_decoder(model, gates)
        self._handles = [
            decoder.register_forward_pre_hook(self, with_kwargs=True),
            # always called, so that the tokens of a forward that raised are not taken by a later call of a gate
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True, always_call=True),
            # whatever saves the model asks for the weights first: save_pretrained, Trainer, PEFT, torch.save
            decoder.register_state_dict_pre_hook(SavingHint(self.named)),
        ]
        # prepended, so that no other hook on a layer meets a keyword argument that it does not know
        layers = decoder_layers(model, gates)
        for layer in layers:
            self._handles.append(layer.register_forward_pre_hook(self._before_layer, prepend=True, with_kwargs=True))
        for part in (part for layer in layers for part in layer.children() if takes_any_keyword(part)):
            self._handles.append(part.register_forward_pre_hook(self._before_part, prepend=True, with_kwargs=True))
        # prepended, so that transformers' recorders of `router_logits` see the logits that were really used
        for gate in gates:
            self._handles.append(gate.module.register_forward_hook(GateHook(self, gate.layer), prepend=True))
        self.follow_logits(model, decoder)
        in_force.take_effect(self, decoder)

    def follow_logits(self, model: nn.Module, decoder: PreTrainedModel | None = None) -> bool:
        """Puts hooks on the language model around the decoder, if there is one without them: whether it did."""
        found = LogitsHooks.of(model, self)
        if found is not None and found[0].are_current(found[1]):
            return False
        decoder = find_decoder(model, find_gates(model)) if decoder is None else decoder
        language_model = find_language_model(model, decoder)
        if language_model is None:
            return False
        if found is not None:
            found[0].remove()
        self._handles += LogitsHooks(self, language_model).handles
        return True

    @classmethod
    def of(cls, model: nn.Module) -> "RoutingHooks | None":
        """The `RoutingHooks` on `model`; None if it has none."""
        for module in model.modules():
            for hook in list(module._forward_pre_hooks.values()):  # a copy: another thread may change it
                if isinstance(hook, cls):
                    return hook
        return None

    # A hook that PyTorch looked up just before another thread removed it gets no keyword arguments.

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        """Pre-hook of the decoder: adds the call's tokens to the keyword arguments that its layers get."""
        if kwargs is None:
            return None
        call = Call(self)
        if not torch.compiler.is_compiling():  # a graph has taken the hooks in when it runs
            call.thread = threading.get_ident()
            with in_force.lock:
                if not self._handles:  # another thread has just removed them
                    return None
                self._running.add(weakref.ref(call, self._has_ended))
        # asked for after the call is known to run, so that hooks whose overrides it uses stay until it has ended
        if current := self.current:
            try:
                call.tokens = CallTokens(named_arguments(args, kwargs), current, decoder)
            except BaseException:
                call.has_failed = True
                raise
        tokens_arrived(self, call.tokens)
        return args, kwargs | {TOKENS: call}

    def _after_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict, output=None) -> None:
        current_layer.call = None
        call = kwargs.get(TOKENS)  # None if the hooks were put on the model during this forward
        tokens = call.tokens if call is not None else None
        try:
            if output is None:  # the forward raised
                return
            if tokens is not None:
                check_routed(tokens, decoder.config.num_hidden_layers)
            keep_state(named_arguments(args, kwargs), output, tokens)
            if call is not None:
                call.has_returned = True
            call = None
        finally:
            if call is not None:
                call.has_failed = True

    def _before_layer(self, layer: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        if kwargs is None:
            return None
        current_layer.call = kwargs.get(TOKENS)
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            # `forward` runs again during backward, when other calls may have run in between, and without this hook:
            # its keyword arguments are then the same as the first time
            return None
        return without_tokens(args, kwargs)

    def _before_part(self, part: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        if kwargs is None or TOKENS not in kwargs:
            return None
        current_layer.call = kwargs[TOKENS]
        return without_tokens(args, kwargs)

    def __getstate__(self) -> dict:
        """What copies and pickles hold: a copy that is made inside a context is outside of it."""
        return {name: value for name, value in vars(self).items() if name not in ("key", "_running")} | {"users": 0}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _running=set())
        self.key = in_force.register(self)

    @property
    def current(self) -> Overrides:
        """The overrides in force for the calling thread or task; empty if there are none."""
        return getattr(in_force, self.key)

    @property
    def current_name(self) -> str | None:
        """The name of `current`; None if they have none, or if none are in force."""
        choices = in_force.choices(self)
        return choices[0].name if choices else self.active

    def choose(self, name: str) -> None:
        """Puts a name in force: in the innermost context open here that is not fixed, or else as the default."""
        forget_interrupted_forward()
        overrides = self.named[name]
        choices = [choice for choice in in_force.choices(self) if not choice.is_fixed]
        if not choices:
            self.active, self.default = name, overrides
        elif chosen := next((choice for choice in choices if not choice.is_off), None):
            in_force.change(chosen, chosen._replace(overrides=overrides, name=name))
        else:
            logger.warning(
                "%r is not put in force, neither inside disable_memory(model) nor after it: use use_memory(model, %r) "
                "inside, or set_memory(model, %r) after it",
                *(name, name, name),
            )

    def detach(self, names: list[str]) -> None:
        """Forgets overrides; in force they stay only in contexts of other threads and tasks, and in running calls."""
        forget_interrupted_forward()
        for name in names:
            del self.named[name]
        if self.active in names:
            self.active, self.default = None, in_force.NONE
        for choice in in_force.choices(self):
            if choice.name in names and not choice.is_fixed:
                in_force.change(choice, choice._replace(overrides=in_force.NONE, name=None))

    def using(self, overrides: Overrides) -> AbstractContextManager[None]:
        """Inside this context these overrides are in force for the calling thread or task, whatever is chosen."""
        return opened(in_force.Choice(in_force.Context(self), overrides, is_fixed=True))

    def remove_if_unused(self) -> bool:
        """Removes every hook, unless overrides are attached, or a context is open or a forward running anywhere."""
        with in_force.lock:
            if self.named or self.users or any(self._may_run()):
                return False
            for handle in self._handles:
                handle.remove()
            self._handles = []
            return True

    def _may_run(self) -> Iterator[bool]:
        for reference in list(self._running):
            running = reference()
            yield running is not None and running.may_run()

    def _has_ended(self, call: weakref.ref) -> None:
        if sys is None or sys.is_finalizing():  # this module, or those that it needs, may be gone
            return
        with in_force.lock:
            self._running.discard(call)
            self.remove_if_unused()


@contextmanager
def hooked(model: nn.Module) -> Iterator[RoutingHooks]:
    """Inside this context the model has hooks; new ones are removed at the end unless something was attached."""
    with in_force.lock:
        found = RoutingHooks.of(model)
        hooks = found if found is not None else RoutingHooks(model)
        is_changed = found is None or hooks.follow_logits(model)
        hooks.users += 1
    try:
        if is_changed:
            in_force.forget_compiled_graphs(model)
        yield hooks
    finally:
        with in_force.lock:
            hooks.users -= 1
        remove_unused_hooks(model, hooks)


def remove_unused_hooks(model: nn.Module, hooks: RoutingHooks) -> None:
    """As `RoutingHooks.remove_if_unused`; if they are removed, compiled graphs of the model are dropped."""
    if hooks.remove_if_unused():
        in_force.forget_compiled_graphs(model)


@contextmanager
def opened(choice: in_force.Choice) -> Iterator[None]:
    """Inside this context the choice decides for the calling thread or task, unless another context is inside."""
    forget_interrupted_forward()
    with in_force.lock:
        in_force.begin(choice)
    try:
        yield
    finally:
        forget_interrupted_forward()
        in_force.end(choice.context)


def in_force_for(model: nn.Module) -> tuple[Overrides, str | None]:
    """What is in force on a model for the calling thread or task, and its name, if it has one."""
    hooks = RoutingHooks.of(model)
    return (in_force.NONE, None) if hooks is None else (hooks.current, hooks.current_name)


@contextmanager
def fixed(model: nn.Module) -> Iterator[None]:
    """
    Inside this context, what is in force at its beginning stays in force for the calling thread or task, whatever is
    attached, detached or chosen meanwhile, and wherever; if it is nothing, then nothing.
    """
    with ExitStack() as stack:
        with in_force.lock:
            context = in_force.Context(RoutingHooks.of(model), model)
            overrides, name = in_force_for(model)
            stack.enter_context(opened(in_force.Choice(context, overrides, name, is_fixed=True)))
        yield


@contextmanager
def using_overrides(model: nn.Module, overrides: Overrides) -> Iterator[None]:
    """As `RoutingHooks.using`, on a model that may have no hooks yet."""
    with hooked(model) as hooks, hooks.using(overrides):
        yield
