"""Finding the gates (routers) of a model, by the router class that transformers records for its model class."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from knnmoe_hf.errors import UnsupportedModelError, shown
from knnmoe_hf.lookup.rules import RoutingRule
from knnmoe_hf.models.families import FAMILIES, Family
from knnmoe_hf.models.offload import as_in_forward, is_offloaded, modules_around
from knnmoe_hf.models.refused import REFUSED


@dataclass(frozen=True)
class Gate:
    """The router of one MoE layer, with the sizes that a memory needs."""

    layer: int  # index of the decoder layer: the first number in `name`
    name: str  # module path, such as "model.layers.3.mlp.gate"
    block: str  # module path of its decoder layer, such as "model.layers.3"
    module: nn.Module
    caller: nn.Module  # the module that calls it, such as that at "model.layers.3.mlp"
    family: Family
    rule: RoutingRule  # from logits to expert weights and ids, with the gate's tensors as they were when it was found
    top_k: int
    hidden_size: int  # d
    num_experts: int  # E
    around: tuple[nn.Module, ...]  # the modules that contain it, outermost first

    @property
    def weight(self) -> Tensor:
        """(E, d), the weight of its logits."""
        return self.family.weight_of(self.module)

    @property
    def max_width(self) -> int:
        """The most experts that a token can be given."""
        return self.rule.widest(self.top_k, self.num_experts)

    def current_rule(self) -> RoutingRule:
        """The rule with the gate's tensors as they are now, which offloading moves while the gate runs."""
        return self.family.rule_of(self.module, self.caller)


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
            if a layer has two gates, or if the model has no gate at all.
    """
    classes = router_classes(model)
    modules, gates = dict(model.named_modules()), []
    for name, module in modules.items():
        if not isinstance(module, classes):
            continue
        gate = _gate(modules, name, module)
        if gates and gates[-1].block == gate.block:
            raise UnsupportedModelError(
                f"layer {gate.layer} has two gates, {gates[-1].name} and {name}: an adapter holds a copy of the gate "
                "(modules_to_save), so merge it with merge_and_unload or train the gate through target_parameters."
            )
        gates.append(gate)
    if not gates:
        raise UnsupportedModelError(_without_gates(type(model).__name__, classes))
    _check_one_tower(gates)
    return gates


def _gate(modules: dict[str, nn.Module], name: str, router: nn.Module) -> Gate:
    classes = [c.__name__ for c in type(router).__mro__]
    family = next((family for c in classes for family in FAMILIES if family.router_class == c), None)
    if family is None:
        raise UnsupportedModelError(_unsupported(f"the router {type(router).__name__} at {name}", classes))
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if number is None:
        raise UnsupportedModelError(
            f"the router {type(router).__name__} at {name!r} is in no decoder layer with a number: give a whole model."
        )
    caller = _caller(modules, name)
    try:
        rule, top_k = family.rule_of(router, caller), router.top_k
        num_experts, hidden_size = family.sizes(router)
    except (AttributeError, ValueError) as error:
        raise UnsupportedModelError(
            f"the router {type(router).__name__} at {name} is not that of {family.name} as transformers 5.23 has it "
            f"({error}): use transformers 5.23 or newer, and a model whose routers are not replaced."
        ) from error
    block = name[: number.end(1)]
    around = modules_around(modules[""], name)
    sizes = (top_k, hidden_size, num_experts)
    gate = Gate(int(number[1]), name, block, router, caller, family, rule, *sizes, around)
    if rule.bias is None or rule.bias.device.type != "meta":
        return gate
    with weights_of(gate):  # an offloaded bias
        return replace(gate, rule=gate.current_rule())


def _caller(modules: dict[str, nn.Module], name: str) -> nn.Module:
    """The module that calls the router of this name: what holds it, wrappers of adapters and compilers left out."""
    while True:
        name = name.rpartition(".")[0]
        if type(modules[name]).__module__.partition(".")[0] not in ("peft", "torch"):
            return modules[name]


def _check_one_tower(gates: list[Gate]) -> None:
    towers = list(dict.fromkeys(gate.block.rpartition(".")[0] for gate in gates))
    if len(towers) > 1:
        raise UnsupportedModelError(
            f"the model has gates in {len(towers)} towers, {shown(towers)}, and a memory belongs to one language "
            "model: give the part of the model that contains one of them alone."
        )


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
    """The gate's own logits, (N, E) float32 on the device of x, for inputs x (N, d)."""
    with weights_of(gate):
        return gate.family.logits(gate.module, x.float())


@contextmanager
def weights_of(gate: Gate) -> Iterator[None]:
    """Inside this context the tensors of a gate, and those that its caller hands to it, are not offloaded."""
    offloaded = is_offloaded(gate.module) or is_offloaded(gate.caller, recurse=False)
    with as_in_forward([*gate.around, *gate.module.modules()] if offloaded else []):
        yield


def router_classes(model: nn.Module) -> tuple[type, ...]:
    """The classes of the modules that transformers records as the source of the `router_logits` that it returns."""
    classes = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorder = (module._can_record_outputs or {}).get("router_logits")
            for entry in recorder if isinstance(recorder, (list, tuple)) else [recorder]:
                target = getattr(entry, "target_class", entry)  # an OutputRecorder, or the class itself
                if isinstance(target, type):
                    classes.add(target)
    return tuple(classes)


def _without_gates(model: str, routers: tuple[type, ...]) -> str:
    if routers:
        names = ", ".join(sorted(router.__name__ for router in routers))
        return (
            f"{model} has no layer with experts, as its configuration makes all of them dense: load a model whose "
            f"configuration gives experts ({names}) to some layers."
        )
    return (
        f"{model} is not supported: transformers knows no router of its class, so load a model of one of the families "
        f"{_supported()}, with the classes of transformers (without trust_remote_code)."
    )


def _unsupported(what: str, classes: Iterable[str]) -> str:
    for name in classes:
        if name in REFUSED:
            reason, way_out = REFUSED[name]
            return f"{what} is not supported: {reason}, so {way_out} (supported are {_supported()})."
    return f"{what} is of a class that is not supported: load a model of one of the families {_supported()}."


def _supported() -> str:
    return ", ".join(family.name for family in FAMILIES)


def find_decoder(model: nn.Module, gates: list[Gate]) -> PreTrainedModel:
    """The innermost `PreTrainedModel` that contains all gates: its forward gets the attention mask and the cache."""
    modules = {gate.module for gate in gates}
    containers = [m for m in model.modules() if isinstance(m, PreTrainedModel) and modules <= set(m.modules())]
    return containers[-1]  # `modules` lists a model before its parts


def decoder_layers(model: nn.Module, gates: list[Gate]) -> list[nn.Module]:
    """All layers of the decoder whose gates these are, also those without a gate, which run among the others."""
    lists = {gate.block.rpartition(".")[0]: None for gate in gates}
    return [layer for path in lists for layer in model.get_submodule(path).children()]
