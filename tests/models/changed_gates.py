"""Ways to change a model's gates, and ways to change a model that leave its gates alone."""

import copy
import functools
from types import MethodType

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from knnmoe_hf import active_memory, detach_memory
from knnmoe_hf.models.gates import find_gates
from tests.models.test_attach import lora


def gate_of(model, layer: int = 1) -> nn.Module:
    return find_gates(model)[layer].module


def parent_of(model, layer: int = 1) -> tuple[nn.Module, str]:
    holder, _, name = find_gates(model)[layer].name.rpartition(".")
    return model.get_submodule(holder), name


def other_weights(model) -> torch.Tensor:
    return torch.randn_like(gate_of(model).weight) * 0.3


def optimizer_step(model):
    gate = gate_of(model)
    gate.weight.requires_grad_(True)
    gate.weight.grad = torch.randn_like(gate.weight)
    torch.optim.AdamW([gate.weight], lr=1e-4, weight_decay=0.0).step()


def replaced_parameter(model):
    gate_of(model).weight = nn.Parameter(other_weights(model))


def patched_forward(model):
    gate = gate_of(model)
    gate.forward = MethodType(lambda self, x: type(self).forward(self, 2 * x), gate)


def routing_otherwise(model):
    gate = gate_of(model)

    def forward(self, x):
        logits, weights, ids = type(self).forward(self, x)
        return logits, weights.flip(-1), ids

    gate.forward = MethodType(forward, gate)


def one_number(model):
    gate_of(model).weight.data[3, 5] += 0.1


def another_top_k(model):
    gate_of(model).top_k = 3


def another_renormalisation(model):
    gate = gate_of(model)
    if not hasattr(gate, "norm_topk_prob"):
        pytest.skip("this family renormalises by its rule alone")
    gate.norm_topk_prob = not gate.norm_topk_prob


def another_bias(model):
    gate = gate_of(model)
    if getattr(gate, "bias", None) is None:
        pytest.skip("this family's gates have no bias")
    gate.bias.data += 0.5


def parametrised(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(gate_of(model), "weight", Doubled())


def lora_on_the_gates(model):
    name = find_gates(model)[0].name.split(".", 3)[3] + ".weight"
    lora(model, target_modules=["q_proj"], target_parameters=[name])


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(with_other_gates(model).state_dict()),
    "weight.copy_": lambda model: gate_of(model).weight.detach().copy_(other_weights(model)),
    "weight.data.copy_": lambda model: gate_of(model).weight.data.copy_(other_weights(model)),
    "weight.data.mul_": lambda model: gate_of(model).weight.data.mul_(1.001),
    "weight.data of one expert": lambda model: gate_of(model).weight.data[2].zero_(),
    "weight.data of one number": one_number,
    "weight.data =": lambda model: setattr(gate_of(model).weight, "data", other_weights(model)),
    "another parameter": replaced_parameter,
    "an optimizer step": optimizer_step,
    "initialised anew": lambda model: nn.init.normal_(gate_of(model).weight),
    "another forward": patched_forward,
    "other weights of experts": routing_otherwise,
    "top_k": another_top_k,
    "norm_topk_prob": another_renormalisation,
    "bias": another_bias,
    "a parametrization": parametrised,
    "LoRA on the gates": lora_on_the_gates,
}


def with_other_gates(model):
    other = copy.deepcopy(model)
    if active_memory(other) is not None:
        detach_memory(other)
    for gate in find_gates(other):
        nn.init.normal_(gate.module.weight)
    return other


UNCHANGED = {
    "the same weights": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "the same weights, other tensors": lambda model: model.load_state_dict(
        copy.deepcopy(model.state_dict()), assign=True
    ),
    "another parameter of the same values": lambda model: setattr(
        gate_of(model), "weight", nn.Parameter(gate_of(model).weight.detach().clone())
    ),
    "train": lambda model: model.train(),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "gradients": lambda model: setattr(gate_of(model).weight, "grad", torch.ones_like(gate_of(model).weight)),
    "to": lambda model: model.to("cpu"),
    "offloaded": lambda model: cpu_offload(model, torch.device("cpu")),
    "LoRA elsewhere": functools.partial(lora, target_modules=["o_proj"]),
    "a hook": lambda model: gate_of(model).register_forward_hook(lambda *_: None),
    "gradient checkpointing": lambda model: model.gradient_checkpointing_enable(),
    "attention implementation": lambda model: model.set_attn_implementation("eager"),
    "experts implementation": lambda model: model.set_experts_implementation("batched_mm"),
    "resized embeddings": lambda model: model.resize_token_embeddings(96),
    "a wrapped forward": lambda model: setattr(
        gate_of(model), "forward", functools.partial(type(gate_of(model)).forward, gate_of(model))
    ),
}
