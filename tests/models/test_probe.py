"""The probe that overrides on a model's gates decide its routing, on models that do their own routing or another's."""

from types import MethodType

import pytest
import torch
from torch.nn import functional as F

from knnmoe_hf import attach_memory
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.probe import probe_model
from tests.conftest import random_memory, tiny_model
from tests.support.attaching import hooks_of


def block_of(model, gate):
    return model.get_submodule(gate.name.rpartition(".")[0])


def returning_as(block, hidden_states):
    """GPT-OSS's blocks return a pair, the others a tensor."""
    return (hidden_states, None) if type(block).__name__ == "GptOssMLP" else hidden_states


def bypass(model, gate):
    """Gives a block the forward of transformers' Mxfp4GptOssMLP: it reads its gate's weights, not its output."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = F.linear(x, gate.module.weight, getattr(gate.module, "bias", None))
        weights, ids = gate.rule(logits, gate.top_k)
        return returning_as(self, self.experts(x, ids, weights).reshape(hidden_states.shape))

    block = block_of(model, gate)
    block.forward = MethodType(forward, block)


def test_a_block_that_bypasses_its_gate_is_refused(family):
    model = tiny_model(family)
    memory = random_memory(model)
    tokens = torch.arange(10)[None]
    base = model(tokens).logits
    gate = find_gates(model)[0]
    bypass(model, gate)
    torch.testing.assert_close(model(tokens).logits, base)  # the same output as before
    with pytest.raises(UnsupportedModelError, match="ran 0 times") as error:
        attach_memory(model, memory)
    for named in (gate.name, type(block_of(model, gate)).__name__, "dequantize=True"):
        assert named in str(error.value)
    assert not hooks_of(model)


def test_a_gate_that_runs_twice_is_refused(model):
    memory = random_memory(model)
    gate = find_gates(model)[1]
    mlp = block_of(model, gate)
    forward = mlp.forward

    def twice(self, hidden_states):
        forward(hidden_states)
        return forward(hidden_states)

    mlp.forward = MethodType(twice, mlp)
    with pytest.raises(UnsupportedModelError, match=f"{gate.name} ran 2 times"):
        attach_memory(model, memory)
    assert not hooks_of(model)


def sigmoid_rule(self, x):
    logits = F.linear(x, self.weight)
    weights, ids = torch.topk(logits.sigmoid(), self.top_k)
    return logits, weights.to(logits.dtype), ids


def probabilities_first(self, x):
    logits, weights, ids = type(self).forward(self, x)
    return logits.softmax(-1), weights, ids


@pytest.mark.parametrize(
    "forward, dtype",
    [
        (sigmoid_rule, torch.float32),
        (sigmoid_rule, torch.bfloat16),
        (probabilities_first, torch.float32),
        (probabilities_first, torch.float16),
    ],
)
def test_a_gate_that_does_not_follow_its_familys_rule_is_refused(family, forward, dtype):
    model = tiny_model(family).to(dtype)
    memory = random_memory(model)
    gate = find_gates(model)[1]
    gate.module.forward = MethodType(forward, gate.module)
    with pytest.raises(UnsupportedModelError, match="does not follow the rule") as error:
        probe_model(model)
    assert gate.name in str(error.value) and "transformers 5.23" in str(error.value)
    with pytest.raises(UnsupportedModelError):
        attach_memory(model, memory)
    assert not hooks_of(model)


def test_a_gate_that_returns_logits_alone_is_refused(model):
    memory = random_memory(model)
    gate = find_gates(model)[0]
    gate.module.register_forward_hook(lambda module, args, output: output[0])
    block = block_of(model, gate)

    def forward(self, hidden_states):
        gate.module(hidden_states)
        return returning_as(self, hidden_states)

    block.forward = MethodType(forward, block)
    with pytest.raises(UnsupportedModelError, match=f"{gate.name} returned Tensor"):
        attach_memory(model, memory)
    assert len(hooks_of(model)) == 1  # ours


def test_the_probe_restores_modes_and_leaves_no_hooks(model):
    model.config.output_router_logits = model.config.output_hidden_states = True
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    probe_model(model)
    assert [module.training for module in model.modules()] == modes
    assert not hooks_of(model)
