"""Hooks on a model's gates: they hand each gate's input and output to whatever decides the routing now.

A memory is one such `RoutingOverride`; the builder's trainable logits are another. Nothing here knows of either. The
hooks in the model's own hook lists are the only record of them: a copied model carries its own, a detached one none.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager

from torch import Tensor, nn

from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.calls import CallTokens, keep_state, named_arguments
from knnmoe_hf.models.gates import Gate, find_decoder, recorded_classes
from knnmoe_hf.models.kv_state import StateOwner

GateOutput = tuple[Tensor, Tensor, Tensor]
"""A gate's output: logits (T, E), expert weights (T, k), expert ids (T, k)."""

RoutingOverride = Callable[[Tensor, GateOutput, Tokens], GateOutput | None]
"""From a gate's input (T, d), its output and what is known of its tokens to the output that is used instead; None
leaves the gate's own."""

_TOKENS = "knnmoe_tokens"
_running = threading.local()  # `.tokens`: those of the layer that this thread is in


class GateHook:
    """Forward hook of one gate; calls the route that is in force for its layer."""

    def __init__(self, hooks: "RoutingHooks", layer: int):
        self.hooks = hooks
        self.layer = layer

    def __call__(self, gate: nn.Module, args: tuple, output: GateOutput) -> GateOutput | None:
        route = self.hooks.current.get(self.layer)
        if route is None:
            return None
        x = args[0].reshape(-1, args[0].shape[-1])
        tokens, _running.tokens = getattr(_running, "tokens", None), None  # said once, so that nothing of it stays
        return route(x, output, tokens or Tokens(1, len(x)))


class RoutingHooks:
    """
    All hooks of one model, and the named sets of routes of which one or none is in force.

    Args:
        model: the model that was searched for gates, as given by the user.
        gates: its gates.
    """

    def __init__(self, model: nn.Module, gates: list[Gate]):
        self.named: dict[str, dict[int, RoutingOverride]] = {}
        self.active: str | None = None
        self.disabled = 0
        self.current: dict[int, RoutingOverride] = {}
        self.owner: StateOwner | None = None  # of what the routes in force leave in a cache
        self._owners: dict[str, tuple[dict[int, RoutingOverride], StateOwner]] = {}
        decoder = find_decoder(model, gates)
        self._handles = [
            decoder.register_forward_pre_hook(self, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
        ]
        attention = recorded_classes(decoder, "attentions")
        for module in decoder.modules():
            if isinstance(module, attention):
                self._handles.append(module.register_forward_pre_hook(self._before_attention, with_kwargs=True))
        # prepended: transformers' own recorders of `router_logits` then see the logits that were used
        for gate in gates:
            self._handles.append(gate.module.register_forward_hook(GateHook(self, gate.layer), prepend=True))

    @classmethod
    def of(cls, model: nn.Module) -> "RoutingHooks | None":
        """The hooks that `model` carries, if any."""
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, cls):
                    return hook
        return None

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the decoder runs: tells its layers what is known of its tokens."""
        if not self.current:
            return None
        return args, kwargs | {_TOKENS: CallTokens(named_arguments(args, kwargs), self.owner)}

    def _after_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        keep_state(named_arguments(args, kwargs), output, kwargs.get(_TOKENS))

    def _before_attention(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # What a decoder layer hands to its attention, just before its gate, is also there when gradient checkpointing
        # repeats the layer during backward, though other forwards may have run since.
        if not self.current:
            return None
        _running.tokens = kwargs.get(_TOKENS)
        return args, {name: value for name, value in kwargs.items() if name != _TOKENS}

    def select(self) -> None:
        """Brings the routes in force in line with `active` and `disabled`."""
        name = None if self.disabled else self.active
        owners = {}
        for known, routes in self.named.items():
            held = self._owners.get(known)
            owners[known] = held if held is not None and held[0] is routes else (routes, StateOwner())
        self._owners = owners
        self.current, self.owner = ({}, None) if name is None else owners[name]

    @contextmanager
    def suspended(self):
        """No route is in force inside; contexts nest."""
        self.disabled += 1
        self.select()
        try:
            yield
        finally:
            self.disabled -= 1
            self.select()

    @contextmanager
    def resumed(self):
        """Inside, the active routes are in force although they are suspended outside."""
        disabled, self.disabled = self.disabled, 0
        self.select()
        try:
            yield
        finally:
            self.disabled = disabled
            self.select()

    def remove(self) -> None:
        """Takes every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.named, self._owners, self.current = [], {}, {}, {}
