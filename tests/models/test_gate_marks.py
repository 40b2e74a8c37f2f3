"""A decoding step reads no values of a gate that nobody touched, and notices one that somebody did."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from knnmoe_hf import attach_memory
from knnmoe_hf.errors import MemoryMismatchError
from knnmoe_hf.models.gate_marks import GateMarks
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import RoutingHooks
from tests.models.callers import ActingProcessor
from tests.models.changed_gates import CHANGES, UNCHANGED, gate_of
from tests.models.test_attach import logits_of
from tests.support.models import random_memory, tiny_model

THROUGH_DATA = (
    "weight.data.copy_",
    "weight.data.mul_",
    "weight.data of one expert",
    "weight.data of one number",
    "bias",
)


class Operations(TorchDispatchMode):
    """Lists what is computed inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def checked(model, is_step: bool) -> list[str]:
    """What is computed to check the gate of layer 1."""
    watch, gate = RoutingHooks.of(model).default.watches[1], gate_of(model)
    x = torch.randn(1, gate.weight.shape[1])
    with torch.no_grad():
        output = gate.forward(x)
        with Operations() as operations:
            assert watch.checked(gate, (x,), output, is_step) is output
    return operations.names


def test_a_step_reads_no_values(model):
    attach_memory(model, random_memory(model))
    assert checked(model, is_step=True) == []
    assert "aten.equal.default" in checked(model, is_step=False)


@pytest.mark.parametrize("what", [name for name in UNCHANGED if name != "offloaded"])
def test_what_makes_no_difference_is_looked_into_once(model, tokens, what):
    attach_memory(model, random_memory(model))
    UNCHANGED[what](model)
    logits_of(model, tokens)
    assert checked(model, is_step=True) == []


def test_a_copy_is_looked_into_once(model, tokens):
    attach_memory(model, random_memory(model))
    twin = copy.deepcopy(model)
    assert checked(twin, is_step=True) != []
    assert checked(twin, is_step=True) == []


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in THROUGH_DATA])
def test_a_change_amid_a_generation_is_noticed_in_its_next_step(model, tokens, change):
    attach_memory(model, random_memory(model))
    steps = []
    processors = [
        ActingProcessor(lambda: (CHANGES[change](model), steps.append("changed"))),
        ActingProcessor(lambda: steps.append("went on"), at=4),
    ]
    with pytest.raises(MemoryMismatchError, match="gate of layer [01]"):
        model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, logits_processor=processors)
    assert steps == ["changed"]


@pytest.mark.parametrize("change", THROUGH_DATA)
def test_a_change_that_leaves_no_mark_is_noticed_in_the_next_call_of_several_tokens(model, tokens, change):
    attach_memory(model, random_memory(model))
    processors = [ActingProcessor(lambda: CHANGES[change](model))]
    model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, logits_processor=processors)
    with pytest.raises(MemoryMismatchError, match="gate of layer [01]"):
        logits_of(model, tokens)


def test_marks_of_a_gate_in_parts_cover_the_parts():
    gate = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    marks = GateMarks(gate, ())
    assert marks.fit(gate, ())
    gate[1].weight.detach().zero_()
    assert not marks.fit(gate, ())
    marks = GateMarks(gate, ())
    gate[0] = copy.deepcopy(gate[0])
    assert not marks.fit(gate, ())
    marks = GateMarks(gate, ())
    gate.add_module("2", nn.Identity())
    assert not marks.fit(gate, ())


def test_marks_cover_what_a_block_hands_to_its_gate():
    gate, bias = nn.Linear(3, 2), torch.zeros(2)
    marks = GateMarks(gate, (bias, None))
    assert marks.fit(gate, (bias, None))
    assert not marks.fit(gate, (bias.clone(), None)) and not marks.fit(gate, (bias,))
    bias += 1
    assert not marks.fit(gate, (bias, None))


def test_weights_made_under_inference_mode_have_marks():
    with torch.inference_mode():
        gate = nn.Linear(3, 2)
        marks = GateMarks(gate, ())
    assert marks.fit(gate, ())
    gate.weight.data = torch.zeros(2, 3)
    assert not marks.fit(gate, ())


def test_a_model_with_a_memory_is_freed_at_once(tokens):
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model))
    logits_of(model, tokens)
    gone = weakref.ref(find_gates(model)[0].module), weakref.ref(RoutingHooks.of(model).default)
    gc.collect()
    gc.disable()
    try:
        del model
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()
