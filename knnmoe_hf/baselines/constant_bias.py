"""A constant bias: the control that asks whether retrieval matters, as it routes a whole domain in one way."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from knnmoe_hf.baselines.base import constant, overriding, rerouted
from knnmoe_hf.baselines.tuning import RATES, Tuned, descend, next_token_loss
from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.gates import Gate, find_gates
from knnmoe_hf.tasks.items import Item, rows_of


class AddedBias:
    """A `RoutingOverride`: adds a vector (E,) float32 to a gate's logits and routes by the model's own rule."""

    def __init__(self, gate: Gate, bias: Tensor):
        self.gate, self.bias = gate, bias

    def __call__(self, x: Tensor, output: GateOutput, tokens: Tokens) -> GateOutput:
        return rerouted(self.gate, output, output[0].float() + self.bias.to(output[0].device))


@contextmanager
def added_biases(model: nn.Module, biases: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Inside this context each layer's gate has a bias, by `str(layer)`, added to its logits."""
    gates = {str(gate.layer): gate for gate in find_gates(model)}
    with overriding(model, {gates[name].layer: AddedBias(gates[name], bias) for name, bias in biases.items()}):
        yield model


@dataclass
class ConstantBias(Tuned):
    """One vector of logits for each layer, the same for every token, fitted on the references' likelihood."""

    source: ClassVar[str] = "a control; no publication"

    learning_rates: Sequence[float] = constant([0.01, 0.03], RATES, ours=True)

    def _train(self, model: nn.Module, items: Sequence[Item], seed: int, rate: float) -> dict[str, Tensor]:
        biases = {str(gate.layer): torch.zeros(gate.num_experts) for gate in find_gates(model)}
        loss = next_token_loss(model, rows_of(items, self.answer_only))
        with added_biases(model, biases):
            descend(list(biases.values()), len(items), loss, rate, self.epochs, self.examples_per_step, seed)
        return biases

    def _with(self, model: nn.Module, state: Mapping[str, Tensor]):
        return added_biases(model, state)
