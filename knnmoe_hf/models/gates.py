"""Finding the gates (routers) of a model, by the router class that transformers records for its model class."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from knnmoe_hf.errors import UnsupportedModelError, shown
from knnmoe_hf.lookup.rules import RoutingRule
from knnmoe_hf.models.families import FAMILIES
from knnmoe_hf.models.offload import modules_around, weights_of, whole


@dataclass(frozen=True)
class Gate:
    """The router of one MoE layer, with the sizes that a memory needs."""

    layer: int  # index of the decoder layer: the first number in `name`
    name: str  # module path, such as "model.layers.3.mlp.gate"
    module: nn.Module
    rule: RoutingRule  # from logits to expert weights and ids
    top_k: int
    hidden_size: int  # d
    num_experts: int  # E
    around: tuple[nn.Module, ...] = ()  # the modules that contain it, outermost first


def find_gates(model: nn.Module) -> list[Gate]:
    """
    All gates of `model`, in the order of its layers.

    transformers records for each model class which modules output `router_logits`; those modules are the gates. The
    index of a gate's decoder layer is the first number in its module path ("model.layers.3.mlp.gate": 3), which holds
    for all supported families; a family with another number before it (several towers, say) needs another rule here.

    Args:
        model: a supported transformers model, plain, PEFT-wrapped or compiled; it may be on the meta device.

    Raises:
        UnsupportedModelError: if transformers records no router for the model, if a router is of no supported family,
            or if a layer has two gates.
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
        gates.append(Gate(layer, name, module, family.rule_of(module), *sizes, modules_around(model, name)))
    if not gates:
        raise UnsupportedModelError(_unsupported(type(model).__name__))
    return gates


def select_gates(gates: list[Gate], layers: list[int] | None) -> list[Gate]:
    """
    The gates of these decoder layers; all gates if `layers` is None.

    Raises:
        ValueError: for a layer without a gate.
    """
    present = [gate.layer for gate in gates]
    if layers is not None and (missing := sorted(set(layers) - set(present))):
        raise ValueError(f"layers={shown(layers)}: {shown(missing)} have no gate, choose among {shown(present)}.")
    return [gate for gate in gates if layers is None or gate.layer in layers]


def gate_logits(gate: Gate, x: Tensor) -> Tensor:
    """The gate's own logits `x W^T + b`, (N, E) float32 on the device of x, for inputs x (N, d)."""
    with weights_of(gate.module, gate.around):
        weight, bias = gate.module.weight, getattr(gate.module, "bias", None)
        weight = whole(weight.detach()).to(x.device, torch.float32)
        bias = whole(bias.detach()).to(x.device, torch.float32) if bias is not None else None
        return F.linear(x.float(), weight, bias)


def recorded_classes(model: nn.Module, output: str) -> tuple[type, ...]:
    """The classes of the modules that transformers records as the source of `output`, such as "router_logits"."""
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
    return f"{what} is not supported: load a model of one of the families {families}."


def find_decoder(model: nn.Module, gates: list[Gate]) -> PreTrainedModel:
    """The innermost `PreTrainedModel` that contains all gates: its forward gets the attention mask and the cache."""
    modules = {gate.module for gate in gates}
    containers = [m for m in model.modules() if isinstance(m, PreTrainedModel) and modules <= set(m.modules())]
    return containers[-1]  # `modules` lists a model before its parts
