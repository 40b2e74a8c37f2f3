"""Where a model's gates are, by the model's own record of its router class."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from knnmoe_hf.errors import UnsupportedModelError, shown
from knnmoe_hf.lookup.rules import RoutingRule
from knnmoe_hf.models.families import FAMILIES


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
