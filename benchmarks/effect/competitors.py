"""What else the same reference tokens could buy: competitors of a memory, and what each would ship."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from examples.router_only_baseline import fit, tune_routers
from knnmoe_hf import attach_override
from knnmoe_hf.models.gates import Gate, find_gates

RATES = {"constant bias": (0.01, 0.03), "LoRA": (3e-4, 1e-3, 3e-3)}
"""Learning rates that are tried; the one with the least NLL on validation text is taken."""
_RANK, _ALPHA = 8, 16
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # fused tensors: parameters, not modules
_FULL_RATE = 3e-4


@dataclass(frozen=True)
class Tuned:
    """
    A copy of the model after training.

    Attributes:
        model: the copy.
        nbytes: of what would be shipped beside the base model, in the dtype that it was trained in.
        seconds: CPU time of the training.
    """

    model: nn.Module
    nbytes: int
    seconds: float


class _Bias:
    """A `RoutingOverride`: adds a vector (E,) to the gate's logits and routes by the model's own rule."""

    def __init__(self, gate: Gate, bias: nn.Parameter):
        self.gate, self.bias = gate, bias

    def __call__(self, x: Tensor, output: tuple, tokens) -> tuple:
        logits = output[0] + self.bias.to(output[0].dtype)
        return logits, *self.gate.rule(logits, self.gate.top_k)


def constant_bias(model: nn.Module, rows: list[dict], seed: int, rate: float) -> list[nn.Parameter]:
    """One vector of logits for each layer, the same for every token."""
    overrides = {gate.layer: _Bias(gate, nn.Parameter(torch.zeros(gate.num_experts))) for gate in find_gates(model)}
    attach_override(model, overrides, "bias")
    biases = [override.bias for override in overrides.values()]
    fit(model, biases, rows, rate, seed=seed)
    return biases


def router_only(model: nn.Module, rows: list[dict], seed: int, rate: None) -> list[nn.Parameter]:
    """The gates' weights, as in `examples/router_only_baseline.py`."""
    return tune_routers(model, rows, seed=seed)


def lora(model: nn.Module, rows: list[dict], seed: int, rate: float) -> list[nn.Parameter]:
    """PEFT's low-rank updates of attention and of every expert; `model` is wrapped in place."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=_RANK, lora_alpha=_ALPHA, target_modules=_ATTENTION, target_parameters=_EXPERTS
    )
    wrapped = get_peft_model(model, config)
    adapter = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    fit(wrapped, adapter, rows, rate, seed=seed)
    return adapter


def full(model: nn.Module, rows: list[dict], seed: int, rate: None) -> list[nn.Parameter]:
    """Every weight."""
    weights = list(model.parameters())
    fit(model, weights, rows, _FULL_RATE, seed=seed)
    return weights


COMPETITORS: dict[str, Callable] = {
    "constant bias": constant_bias,
    "router-only": router_only,
    "LoRA": lora,
    "full fine-tuning": full,
}
KEEPS_WEIGHTS = ("constant bias", "LoRA")
"""Competitors that leave the model's own weights as they are, and can be taken off again."""


def tuned(name: str, model: nn.Module, rows: list[dict], seed: int, rate: float | None = None) -> Tuned:
    """A competitor trained on its own copy of the model; `rate` is one of its `RATES`, if it has any."""
    changed = copy.deepcopy(model)
    began = time.process_time()
    shipped = COMPETITORS[name](changed, rows, seed, rate)
    return Tuned(changed, sum(tensor.nbytes for tensor in shipped), time.process_time() - began)
