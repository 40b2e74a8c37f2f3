"""An override of the routing that depends on a running mean over the sequence, which nothing may disturb."""

import torch

from knnmoe_hf import attach_override, detach_memory
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import RoutingHooks
from tests.support.models import tiny_model

HALF_LIFE = 8.0


class ByContext:
    """A `RoutingOverride` that shifts a gate's logits by as much as the running mean of its inputs says."""

    def __init__(self, gate, half_life=HALF_LIFE):
        self.gate, self.half_life = gate, half_life
        self.pattern = torch.linspace(-2, 2, gate.num_experts)
        self.values, self.means = [], []

    def __call__(self, x, output, tokens):
        values = x.float().mean(-1)
        mean = tokens.running_mean(self.gate.layer, values, self.half_life)
        if not torch.compiler.is_compiling():
            self.values.append(values.detach())
            self.means.append(mean.detach())
        logits = output[0] + torch.tanh(10 * mean)[:, None] * self.pattern
        return logits, *self.gate.rule(logits, self.gate.top_k)


def put_on(model, name="context", override=ByContext, **options) -> dict:
    """Attaches such an override of every gate, instead of any of the same name; returns `{layer: override}`."""
    hooks = RoutingHooks.of(model)
    if hooks is not None and name in hooks.named:
        detach_memory(model, name)
    overrides = {gate.layer: override(gate, **options) for gate in find_gates(model)}
    attach_override(model, overrides, name)
    return overrides


def contextual_model(family, **options):
    """A tiny model with such an override in force."""
    model = tiny_model(family, **options)
    put_on(model)
    return model
