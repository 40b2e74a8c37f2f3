"""Hooks on a model's gates: they hand each gate's input and output to whatever decides the routing now.

A memory is one such `Route`; the builder's trainable logits are another. Nothing here knows of either. The hooks in
the model's own hook lists are the only record of them: a copied model carries its own, a detached one carries nothing.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from knnmoe_hf.routing import Gate, find_decoder

Routes = tuple[Tensor, Tensor, Tensor]
"""A gate's output: logits (T, E), expert weights (T, k), expert ids (T, k)."""

Route = Callable[[Tensor, Routes, Tensor | None], Routes | None]
"""From a gate's input (T, d), its output, and which tokens are real ((T,) bool; None if all are) to the output that is
used instead; None leaves the gate's own."""


class GateHook:
    """Forward hook of one gate; calls the route that is in force for its layer."""

    def __init__(self, hooks: "RoutingHooks", layer: int):
        self.hooks = hooks
        self.layer = layer

    def __call__(self, gate: nn.Module, args: tuple, output: Routes) -> Routes | None:
        route = self.hooks.current.get(self.layer)
        if route is None:
            return None
        return route(args[0].reshape(-1, args[0].shape[-1]), output, self.hooks.real_tokens)


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
        self.real_tokens: Tensor | None = None
        decoder = find_decoder(model, gates)
        self._handles = [decoder.register_forward_pre_hook(self, with_kwargs=True)]
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

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the decoder runs: which of its tokens are real, flattened as the gates see them."""
        # stays until the next forward, because gradient checkpointing runs the gates again during backward
        self.real_tokens = real_tokens(decoder, args, kwargs) if self.current else None

    def select(self) -> None:
        """Brings the routes in force in line with `active` and `disabled`."""
        self.current = {} if self.disabled or self.active is None else self.named[self.active]
        self.real_tokens = None

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
        self._handles, self.named, self.current, self.real_tokens = [], {}, {}, None


def real_tokens(decoder: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    """
    Which of a forward's tokens are real, by its attention mask alone: (B * S,) bool, or None if nothing is masked.

    Reads the forms that transformers passes to a decoder: a (B, L) mask over cache and new tokens, a (B, 1, S, L) mask
    (boolean or additive), or a dict of such masks by attention type. In a 4-D mask a real token sees itself.
    """
    names = ("input_ids", "attention_mask")
    call = dict(zip(names, args)) | kwargs
    mask = call.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return None
    tokens = call.get("input_ids") if call.get("input_ids") is not None else call["inputs_embeds"]
    length = tokens.shape[1]
    if mask.dim() == 2:
        return mask[:, -length:].reshape(-1).bool()
    cache = call.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    step = torch.arange(length, device=mask.device)
    itself = mask[:, 0].expand(tokens.shape[0], -1, -1)[:, step, step + past]  # (B, S)
    return (itself if itself.dtype == torch.bool else itself == 0).reshape(-1)
