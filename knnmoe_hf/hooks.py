"""Hooks on a model's gates: they hand each gate's input and output to whatever decides the routing now.

A memory is one such `Route`; the builder's trainable logits are another. Nothing here knows of either. The hooks in
the model's own hook lists are the only record of them: a copied model carries its own, a detached one carries nothing.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from knnmoe_hf.routing import Gate, find_decoder, recorded_classes

Routes = tuple[Tensor, Tensor, Tensor]
"""A gate's output: logits (T, E), expert weights (T, k), expert ids (T, k)."""

Route = Callable[[Tensor, Routes, Tensor | None], Routes | None]
"""From a gate's input (T, d), its output, and which tokens are real ((T,) bool; None if all are) to the output that is
used instead; None leaves the gate's own."""

_REAL = "knnmoe_real_tokens"
_running = threading.local()  # `.real`: which tokens are real in the layer that this thread is in


class GateHook:
    """Forward hook of one gate; calls the route that is in force for its layer."""

    def __init__(self, hooks: "RoutingHooks", layer: int):
        self.hooks = hooks
        self.layer = layer

    def __call__(self, gate: nn.Module, args: tuple, output: Routes) -> Routes | None:
        route = self.hooks.current.get(self.layer)
        if route is None:
            return None
        real, _running.real = getattr(_running, "real", None), None  # said once, so that nothing of it stays
        return route(args[0].reshape(-1, args[0].shape[-1]), output, real)


class RoutingHooks:
    """
    All hooks of one model, and the named sets of routes of which one or none is in force.

    Args:
        model: the model that was searched for gates, as given by the user.
        gates: its gates.
    """

    def __init__(self, model: nn.Module, gates: list[Gate]):
        self.named: dict[str, dict[int, Route]] = {}
        self.active: str | None = None
        self.disabled = 0
        self.current: dict[int, Route] = {}
        decoder = find_decoder(model, gates)
        self._handles = [decoder.register_forward_pre_hook(self, with_kwargs=True)]
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
        """Before the decoder runs: tells its layers which of its tokens are real, flattened as the gates see them."""
        if not self.current:
            return None
        return args, kwargs | {_REAL: real_tokens(args, kwargs)}

    def _before_attention(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # What a decoder layer hands to its attention, just before its gate, is also there when gradient checkpointing
        # repeats the layer during backward, though other forwards may have run since.
        if not self.current:
            return None
        _running.real = kwargs.get(_REAL)
        return args, {name: value for name, value in kwargs.items() if name != _REAL}

    def select(self) -> None:
        """Brings the routes in force in line with `active` and `disabled`."""
        self.current = {} if self.disabled or self.active is None else self.named[self.active]

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

    def remove(self) -> None:
        """Takes every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.named, self.current = [], {}, {}


def real_tokens(args: tuple, kwargs: dict) -> Tensor | None:
    """
    Which tokens of a decoder's forward are real, by its attention mask alone: (B * S,) bool, or None if all are.

    Reads the forms that transformers passes to a decoder: a (B, L) mask over cache and new tokens, a (B, 1, S, L) mask
    (boolean or additive), or a dict of such masks by attention type. In a 4-D mask a real token sees itself. Packed
    rows and continuous batches, whose masks are laid out by sequence, hold real tokens only.
    """
    call = dict(zip(("input_ids", "attention_mask"), args)) | kwargs
    mask = call.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or call.get("cu_seq_lens_q") is not None:
        return None
    tokens = call.get("input_ids") if call.get("input_ids") is not None else call["inputs_embeds"]
    length, cache = tokens.shape[1], call.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    if mask.dim() == 2:
        return mask[:, : past + length][:, -length:].reshape(-1).bool()
    step = torch.arange(length, device=mask.device)
    column = step + past - _first_column(mask, length, cache)
    itself = mask[:, 0].expand(tokens.shape[0], -1, -1)[:, step, column]  # (B, S)
    return (itself if itself.dtype == torch.bool else itself == 0).reshape(-1)


def _first_column(mask: Tensor, length: int, cache) -> int:
    """Position of the token in the first column of a 4-D mask: a sliding window's mask begins with its window."""
    sizes = [cache.get_mask_sizes(length, layer) for layer in range(len(cache))] if cache is not None else []
    return next((offset for columns, offset in sizes if columns == mask.shape[-1]), 0)
