"""Routing contracts: each supported router's own rule from logits to routes, and where a model's gates are.

A new family is one row of `FAMILIES`; if its rule is new, one function of `(logits, top_k)` beside the others.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from knnmoe_hf.errors import UnsupportedModelError, shown
from knnmoe_hf.lookup.rules import RoutingRule
from knnmoe_hf.models.families import FAMILIES
from knnmoe_hf.models.modes import evaluating


@dataclass(frozen=True)
class Gate:
    """One MoE layer's router inside a model."""

    layer: int  # index of the decoder layer
    name: str  # module path from the model that was searched
    module: nn.Module
    rule: RoutingRule
    top_k: int
    hidden_size: int
    num_experts: int


def find_gates(model: nn.Module) -> list[Gate]:
    """
    Every gate of `model`, in the order of its layers, found through the model's own record of its router class.

    Args:
        model: a supported model of transformers, plain, PEFT-wrapped or compiled; on the meta device too.

    Raises:
        UnsupportedModelError: if the model records no router, or one that no family describes.
    """
    routers = recorded_classes(model, "router_logits")
    families = {family.router_class: family for family in FAMILIES}
    gates = []
    for name, module in model.named_modules():
        if not isinstance(module, routers):
            continue
        family = next((families[c.__name__] for c in type(module).__mro__ if c.__name__ in families), None)
        if family is None:
            raise UnsupportedModelError(_unsupported(f"the router {type(module).__name__} at {name}"))
        layer = int(re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)[1])
        if gates and gates[-1].layer == layer:
            raise UnsupportedModelError(
                f"layer {layer} has two gates, {gates[-1].name} and {name}: an adapter holds a copy of the gate "
                "(modules_to_save), so merge it with merge_and_unload or train the gate through target_parameters."
            )
        sizes = (module.top_k, module.hidden_dim, module.num_experts)
        gates.append(Gate(layer, name, module, family.rule_of(module), *sizes))
    if not gates:
        raise UnsupportedModelError(_unsupported(type(model).__name__))
    return gates


def select_gates(gates: list[Gate], layers: list[int] | None) -> list[Gate]:
    """
    The gates of these decoder layers; all if None.

    Raises:
        ValueError: for a layer without a gate.
    """
    present = [gate.layer for gate in gates]
    if layers is not None and (missing := sorted(set(layers) - set(present))):
        raise ValueError(f"layers={shown(layers)}: {shown(missing)} have no gate, choose among {shown(present)}.")
    return [gate for gate in gates if layers is None or gate.layer in layers]


def gate_logits(gate: Gate, x: Tensor) -> Tensor:
    """The gate's own logits (N, E) float32 for inputs x (N, d), computed from its weights where x is."""
    weight, bias = gate.module.weight.detach(), getattr(gate.module, "bias", None)
    bias = bias.detach().to(x.device, torch.float32) if bias is not None else None
    return F.linear(x.float(), weight.to(x.device, torch.float32), bias)


def recorded_classes(model: nn.Module, output: str) -> tuple[type, ...]:
    """The classes of the modules whose outputs transformers reports as `output`, such as "router_logits"."""
    classes = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorder = (module._can_record_outputs or {}).get(output)
            for entry in recorder if isinstance(recorder, (list, tuple)) else [recorder]:
                target = getattr(entry, "target_class", entry)  # an OutputRecorder, or the class itself
                if isinstance(target, type):
                    classes.add(target)
    return tuple(classes)


def _unsupported(what: str) -> str:
    families = ", ".join(f"{family.name} ({family.router_class})" for family in FAMILIES)
    return f"{what} is not supported: a routing memory attaches to {families}."


def find_decoder(model: nn.Module, gates: list[Gate]) -> PreTrainedModel:
    """The innermost transformers model that holds all gates: the one whose forward sees the attention mask."""
    wanted = {gate.module for gate in gates}
    holders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and wanted <= set(m.modules())]
    return holders[-1]


def check_gates(model: nn.Module, gates: list[Gate]) -> dict[int, torch.device]:
    """
    Proves on a probe forward that a hook on the gates decides the routing.

    Every gate must fire exactly once, and its family's rule, run on its real logits, must reproduce its weights and
    expert ids exactly.

    Returns:
        The device on which each layer's gate runs, `{layer: device}`.

    Raises:
        UnsupportedModelError: naming the module and what to do.
    """
    decoder = find_decoder(model, gates)
    seen: dict[int, list] = {gate.layer: [] for gate in gates}
    handles = [
        gate.module.register_forward_hook(lambda _, args, out, layer=gate.layer: seen[layer].append((args[0], out)))
        for gate in gates
    ]
    try:
        with evaluating(decoder), torch.no_grad():
            embedding = decoder.get_input_embeddings().weight
            device = decoder.device if embedding.device.type == "meta" else embedding.device
            # asking for outputs, as the model's configuration may do, would install transformers' recorders for good
            decoder(torch.arange(8, device=device)[None] % embedding.shape[0], use_cache=False, **_NO_OUTPUTS)
    finally:
        for handle in handles:
            handle.remove()
    for gate in gates:
        _check_gate(gate, seen[gate.layer], _parent(model, gate))
    return {gate.layer: seen[gate.layer][0][0].device for gate in gates}


_NO_OUTPUTS = dict(output_router_logits=False, output_hidden_states=False, output_attentions=False)


def _check_gate(gate: Gate, calls: list, block: nn.Module) -> None:
    if len(calls) != 1:
        raise UnsupportedModelError(
            f"the gate {gate.name} ran {len(calls)} times in one forward where once is expected: its block "
            f"{type(block).__name__} does its own routing, so load the model with Mxfp4Config(dequantize=True) and "
            "without use_kernels, or set `experts._is_hooked = True` on an Mxfp4GptOssMLP (transformers >= 5.23)."
        )
    output = calls[0][1]
    if not (isinstance(output, tuple) and len(output) == 3):
        raise UnsupportedModelError(
            f"the gate {gate.name} returned {type(output).__name__} where (logits, weights, expert ids) is expected: "
            "use transformers 5.23 or newer."
        )
    logits, weights, ids = output
    own = gate.rule(logits, gate.top_k)
    if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(own, (weights, ids))):
        raise UnsupportedModelError(
            f"the gate {gate.name} does not follow the rule {gate.rule.__name__} of its family: this version of "
            "transformers or a patch of the model routes otherwise, so use an unpatched transformers 5.23 or newer."
        )


def _parent(model: nn.Module, gate: Gate) -> nn.Module:
    return model.get_submodule(gate.name.rpartition(".")[0])
