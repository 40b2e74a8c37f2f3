"""Hooks on a model: they hand each gate's input and output to the routing override that is in force for its layer.

A memory's lookups are such overrides; a builder's trainable logits and the competitors of the benchmarks are others.
Nothing here knows of any of them. The hooks in the model's own hook lists are the only record: a copied model carries
copies, a model whose last override was detached carries nothing.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.calls import CallTokens, keep_state, named_arguments
from knnmoe_hf.models.gates import find_decoder, find_gates, recorded_classes
from knnmoe_hf.models.kv_state import StateOwner

RoutingOverride = Callable[[Tensor, GateOutput, Tokens], GateOutput | None]
"""From a gate's input (T, d), its output and what is known of the T tokens to the output that is used instead; None
keeps the gate's own."""

_TOKENS = "knnmoe_tokens"  # keyword argument by which tokens travel from the decoder to each layer's attention
_running = threading.local()  # `.tokens`: those of the layer that this thread is in


class Overrides(dict):
    """
    The routing overrides of one name, `{layer: RoutingOverride}`.

    Attributes:
        owner: identity of the running sums that these overrides leave in a KV cache.
    """

    def __init__(self, overrides: Mapping[int, RoutingOverride]):
        super().__init__(overrides)
        self.owner = StateOwner()


_NONE = Overrides({})


class GateHook:
    """Forward hook of one gate: calls the override that is in force for its layer."""

    def __init__(self, hooks: "RoutingHooks", layer: int):
        self.hooks, self.layer = hooks, layer

    def __call__(self, gate: nn.Module, args: tuple, output: GateOutput) -> GateOutput | None:
        override = self.hooks.current.get(self.layer)
        if override is None:
            return None
        x = args[0].reshape(-1, args[0].shape[-1])
        tokens, _running.tokens = getattr(_running, "tokens", None), None  # taken once, so that none is left over
        if tokens is None or tokens.owner is not self.hooks.current.owner:
            raise UnsupportedModelError(
                f"the gate of layer {self.layer} ran, but the tokens of the model's call did not arrive there: the "
                "decoder must run as a whole and hand its keyword arguments on to the attention of each MoE layer; "
                "use detach_memory(model), or disable_memory(model) around calls of single layers."
            )
        if tokens.shape[0] * tokens.shape[1] != len(x):
            raise UnsupportedModelError(
                f"the gate of layer {self.layer} got {len(x)} tokens of a call of {list(tokens.shape)}: an override "
                "needs all tokens of the call in their order, so switch off what splits or drops them."
            )
        return override(x, output, tokens)


class RoutingHooks:
    """
    All hooks of one model, and the named overrides of which one set or none is in force.

    Args:
        model: as given by the user.

    Raises:
        UnsupportedModelError: if the model has no gate of a supported family.

    Attributes:
        named: `{name: overrides}`.
        active: name of the overrides that `set_memory` chose; None if there are none.
        disabled: how many `suspended` contexts are open.
        current: the overrides in force.
        users: contexts that need these hooks although no overrides are named.
    """

    def __init__(self, model: nn.Module):
        gates = find_gates(model)
        self.named: dict[str, Overrides] = {}
        self.active: str | None = None
        self.disabled = 0
        self.current: Overrides = _NONE
        self.users = 0
        self._temporary: Overrides | None = None
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
        _forget_compiled_graphs(model)

    @classmethod
    def of(cls, model: nn.Module) -> "RoutingHooks | None":
        """The hooks that `model` carries, if any."""
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, cls):
                    return hook
        return None

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the decoder runs: tells its layers what is known of the call's tokens."""
        if not self.current:
            return None
        return args, kwargs | {_TOKENS: CallTokens(named_arguments(args, kwargs), self.current.owner)}

    def _after_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        keep_state(named_arguments(args, kwargs), output, kwargs.get(_TOKENS))

    def _before_attention(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # What a decoder layer hands to its attention, just before its gate, is also there when gradient checkpointing
        # repeats the layer during backward, though other calls may have run since.
        if not self.current:
            return None
        _running.tokens = kwargs.get(_TOKENS)
        return args, {name: value for name, value in kwargs.items() if name != _TOKENS}

    def select(self) -> None:
        """Brings the overrides in force in line with `active` and the open contexts."""
        if self._temporary is not None:
            self.current = self._temporary
        elif self.disabled or self.active is None:
            self.current = _NONE
        else:
            self.current = self.named[self.active]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, no override is in force; contexts nest."""
        temporary, self._temporary = self._temporary, None
        self.disabled += 1
        self.select()
        try:
            yield
        finally:
            self.disabled -= 1
            self._temporary = temporary
            self.select()

    @contextmanager
    def using(self, overrides: Overrides) -> Iterator[None]:
        """Inside, these overrides are in force, also within `suspended`, whatever is named; contexts nest."""
        temporary, self._temporary = self._temporary, overrides
        self.select()
        try:
            yield
        finally:
            self._temporary = temporary
            self.select()

    def remove_if_unused(self, model: nn.Module) -> None:
        """Takes every hook off the model unless overrides are named or a context needs the hooks."""
        if self.named or self.users:
            return
        for handle in self._handles:
            handle.remove()
        self._handles, self.current = [], _NONE
        _forget_compiled_graphs(model)


@contextmanager
def hooked(model: nn.Module) -> Iterator[RoutingHooks]:
    """Inside, the model carries hooks: those that it has, or new ones that go at the end if nothing was attached."""
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
    """Inside, these overrides are in force, even within `disable_memory`; afterwards the model is as before."""
    with hooked(model) as hooks, hooks.using(overrides):
        yield


def _forget_compiled_graphs(model: nn.Module) -> None:
    """
    Drops compiled graphs when a model's first hooks come or its last ones go.

    Graphs do not look at hook lists again, so they would go on without the hooks, or with them. What changes behind
    the hooks is seen by the graphs' own guards.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "_compiled_call", None) is not None:
            del module._compiled_call  # `generate` keeps it, and makes a new one where there is none
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
