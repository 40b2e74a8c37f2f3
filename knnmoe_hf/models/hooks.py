"""Hooks on a model: for each gate they call the routing override in force, with the gate's input and output.

An override is a memory's lookup, the trainable logits of a builder, or a function of the user; this module treats all
of them alike. They are stored in the hooks themselves, in the model's own hook lists: a copied model has copies of
them, and a model whose last override was detached has none.
"""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from knnmoe_hf.errors import UnsupportedModelError, shown
from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.models.calls import CallTokens, Overrides, keep_state, named_arguments
from knnmoe_hf.models.gates import decoder_layers, find_decoder, find_gates

logger = logging.getLogger(__name__)

_TOKENS = "knnmoe_tokens"  # keyword argument that the decoder passes on to each of its layers
_current_layer = threading.local()  # `.call`: what this thread's layer is a part of
_NONE = Overrides({})


class _Call(NamedTuple):
    """One forward of a decoder that carries hooks."""

    hooks: "RoutingHooks"
    tokens: CallTokens | None  # None if no override was in force when it began


class GateHook:
    """Forward hook of one gate: calls the override that was in force for its layer when the forward began."""

    def __init__(self, hooks: "RoutingHooks", layer: int):
        self.hooks, self.layer = hooks, layer

    def __call__(self, gate: nn.Module, args: tuple, output: GateOutput) -> GateOutput | None:
        # taken away, so that no later gate takes the tokens for its own
        call, _current_layer.call = getattr(_current_layer, "call", None), None
        if call is None or call.hooks is not self.hooks:
            if self.layer not in self.hooks.current:
                return None
            raise UnsupportedModelError(
                f"the gate of layer {self.layer} ran, but the tokens of the model's call did not arrive there: the "
                "decoder must run as a whole and hand its keyword arguments on to each of its layers; "
                "use detach_memory(model), or disable_memory(model) around calls of single layers."
            )
        tokens = call.tokens
        if tokens is not None:
            tokens.routed.add(self.layer)
        override = None if tokens is None else tokens.overrides.get(self.layer)
        if override is None:
            return None
        x = args[0].reshape(-1, args[0].shape[-1])
        if tokens.shape[0] * tokens.shape[1] != len(x):
            raise UnsupportedModelError(
                f"the gate of layer {self.layer} got {len(x)} tokens of a call of {list(tokens.shape)}: an override "
                "needs all tokens of the call in their order, so switch off whatever splits or drops tokens, or use "
                "detach_memory(model)."
            )
        return _checked(override(x, output, tokens), output, self.layer)


def _checked(replaced: GateOutput | None, own: GateOutput, layer: int) -> GateOutput | None:
    if replaced is None:
        return None
    if isinstance(replaced, tuple) and len(replaced) == 3 and all(isinstance(one, Tensor) for one in replaced):
        logits, weights, ids = replaced
        if logits.shape == own[0].shape and weights.shape == ids.shape and len(ids) == len(logits):
            return replaced
    raise TypeError(
        f"the routing override of layer {layer} returned {shown(replaced)}: it must return None, or a tuple of logits "
        f"of shape {list(own[0].shape)}, and of expert weights and expert ids of shape [{len(own[0])}, experts]."
    )


class RoutingHooks:
    """
    All hooks of one model, and its overrides by name; those of one name are in force, or none.

    Args:
        model: a supported model, plain, PEFT-wrapped or compiled.

    Raises:
        UnsupportedModelError: if the model has no gate of a supported family.

    Attributes:
        named: `{name: overrides}`.
        active: name last attached or chosen by `set_memory`; None if that name was detached.
        current: the overrides in force.
        users: number of open `hooked` contexts, which keep the hooks on the model even if `named` is empty.
    """

    def __init__(self, model: nn.Module):
        gates = find_gates(model)
        self.named: dict[str, Overrides] = {}
        self.active: str | None = None
        self.current: Overrides = _NONE
        self.users = 0
        self._told_of_saving = False
        self._contexts: list[list[Overrides]] = []  # of the open contexts, the last one first in force
        decoder = find_decoder(model, gates)
        self._handles = [
            decoder.register_forward_pre_hook(self, with_kwargs=True),
            # always called, so that the tokens of a forward that raised are not taken by a later call of a gate
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True, always_call=True),
            # whatever saves the model asks for the weights first: save_pretrained, Trainer, PEFT, torch.save
            decoder.register_state_dict_pre_hook(self._before_state_dict),
        ]
        # prepended, so that no other hook on a layer meets a keyword argument that it does not know
        for layer in decoder_layers(model, gates):
            self._handles.append(layer.register_forward_pre_hook(self._before_layer, prepend=True, with_kwargs=True))
        # prepended, so that transformers' recorders of `router_logits` see the logits that were really used
        for gate in gates:
            self._handles.append(gate.module.register_forward_hook(GateHook(self, gate.layer), prepend=True))
        _forget_compiled_graphs(model)

    @classmethod
    def of(cls, model: nn.Module) -> "RoutingHooks | None":
        """The `RoutingHooks` on `model`; None if it has none."""
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, cls):
                    return hook
        return None

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of the decoder: adds the call's tokens to the keyword arguments that its layers get."""
        current = self.current
        tokens = CallTokens(named_arguments(args, kwargs), current, decoder) if current else None
        return args, kwargs | {_TOKENS: _Call(self, tokens)}

    def _after_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        _current_layer.call = None
        if output is None:  # the forward raised
            return
        call = kwargs.get(_TOKENS)  # None if the hooks were put on the model during this forward
        tokens = call.tokens if call is not None else None
        if tokens is not None:
            _check_routed(tokens, decoder.config.num_hidden_layers)
        keep_state(named_arguments(args, kwargs), output, tokens)

    def _before_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # Gradient checkpointing runs a layer again during backward, when other calls may have run in between. The
        # layer's keyword arguments are then the same as the first time, so the tokens are taken from them here, in
        # every layer, also in one without a gate: its attention may not know the argument.
        _current_layer.call = kwargs.get(_TOKENS)
        return args, {name: value for name, value in kwargs.items() if name != _TOKENS}

    def _before_state_dict(self, decoder: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Says once that the weights of the model are not its memory."""
        names = [name for name, overrides in self.named.items() if hasattr(overrides, "memory")]
        if self._told_of_saving or not names or _is_loading():
            return
        self._told_of_saving = True
        logger.warning(
            "saving the model does not save the memory attached to it (%s), which is no part of its weights: save it "
            "with knnmoe_hf.get_memory(model%s).save_pretrained(folder)",
            ", ".join(map(repr, names)),
            "" if len(names) == 1 else ", name",
        )

    def __getstate__(self) -> dict:
        """What copies and pickles hold: a copy that is made inside a context is outside of it."""
        current = self.named[self.active] if self.active is not None else Overrides({})
        return self.__dict__ | {"_contexts": [], "users": 0, "current": current}

    def select(self) -> None:
        """Sets `current` from `active` and the open contexts; to be called after a change of either."""
        _current_layer.call = None  # left by a forward that was interrupted
        if self._contexts:
            (self.current,) = self._contexts[-1]
        else:
            self.current = self.named[self.active] if self.active is not None else _NONE

    @property
    def disabled(self) -> bool:
        """Whether a `suspended` context is open."""
        return any(overrides is _NONE for (overrides,) in self._contexts)

    def suspended(self) -> AbstractContextManager[None]:
        """Inside this context no override is in force; contexts nest."""
        return self.using(_NONE)

    @contextmanager
    def using(self, overrides: Overrides) -> Iterator[None]:
        """Inside this context these overrides are in force, even within `suspended`; contexts nest."""
        entry = [overrides]  # a list of its own: each context removes its own entry, in whatever order they end
        self._contexts.append(entry)
        self.select()
        try:
            yield
        finally:
            self._contexts = [other for other in self._contexts if other is not entry]
            self.select()

    def remove_if_unused(self, model: nn.Module) -> None:
        """Removes every hook from the model, unless overrides are attached or a `hooked` context is open."""
        if self.named or self.users:
            return
        for handle in self._handles:
            handle.remove()
        self._handles, self.current = [], _NONE
        _forget_compiled_graphs(model)


def _is_loading() -> bool:
    """Whether a library is loading an adapter, for which it looks at the names of a model's weights as well."""
    frame = sys._getframe(1)
    while frame is not None:
        library, name = frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code.co_name
        if library in ("peft", "transformers") and name.startswith(("load_", "_load_", "from_pretrained")):
            return True
        frame = frame.f_back
    return False


def _check_routed(tokens: CallTokens, num_layers: int) -> None:
    # `num_layers` of the config, as early exit in assisted generation runs only the first layers
    if missed := [layer for layer in tokens.overrides if layer not in tokens.routed and layer < num_layers]:
        raise UnsupportedModelError(
            f"the gates of layers {shown(missed)} did not run in a forward with a routing override in force for them: "
            "a gate was replaced after attaching, or something calls its `forward` directly; use detach_memory(model) "
            "and attach again."
        )


@contextmanager
def hooked(model: nn.Module) -> Iterator[RoutingHooks]:
    """Inside this context the model has hooks; new ones are removed at the end unless something was attached."""
    hooks = RoutingHooks.of(model)
    if hooks is None:
        hooks = RoutingHooks(model)
    hooks.users += 1
    try:
        yield hooks
    finally:
        hooks.users -= 1
        hooks.remove_if_unused(model)


@contextmanager
def using_overrides(model: nn.Module, overrides: Overrides) -> Iterator[None]:
    """Inside this context these overrides are in force, even within `disable_memory`."""
    with hooked(model) as hooks, hooks.using(overrides):
        yield


def _forget_compiled_graphs(model: nn.Module) -> None:
    """
    Drops the graphs of torch.compile when hooks are put on a model, or removed from it.

    A compiled graph does not check the hook lists again: it would go on without the new hooks, or with the removed
    ones. While the hooks stay, the graph's own guards notice which overrides are in force.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "_compiled_call", None) is not None:
            del module._compiled_call  # `generate` stores its compiled forward here, and makes one if there is none
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
