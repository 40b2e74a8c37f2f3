"""A fingerprint recognises the same gates in every dtype, and tells them from other models' gates."""

import copy
import itertools

import pytest
import torch

from knnmoe_hf.memory.fingerprint import same_gates
from knnmoe_hf.models.fingerprint import fingerprint
from knnmoe_hf.models.gates import find_gates
from tests.conftest import tiny_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def model():
    """One family is enough: gates differ only in that GPT-OSS's have a bias, which its own test covers."""
    return tiny_model("olmoe")


def _print(model, dtype=torch.float32):
    return fingerprint(find_gates(copy.deepcopy(model).to(dtype)))


def _changed(model, amount: float):
    other = copy.deepcopy(model)
    with torch.no_grad():
        find_gates(other)[1].module.weight[3, 5] += amount
    return other


@pytest.mark.parametrize("ours", DTYPES, ids=str)
@pytest.mark.parametrize("theirs", DTYPES, ids=str)
@pytest.mark.parametrize("checkpoint", DTYPES, ids=str)
def test_same_gates_are_recognised_in_any_two_precisions(model, ours, theirs, checkpoint):
    loaded = model.to(checkpoint)
    assert same_gates(_print(loaded, ours), _print(loaded, theirs))


@pytest.mark.parametrize("ours", DTYPES, ids=str)
@pytest.mark.parametrize("theirs", DTYPES, ids=str)
@pytest.mark.parametrize("checkpoint", [torch.float32, torch.bfloat16], ids=str)
def test_permuted_experts_are_another_model(model, ours, theirs, checkpoint):
    loaded = model.to(checkpoint)
    other = copy.deepcopy(loaded)
    with torch.no_grad():
        for gate in find_gates(other):
            gate.module.weight.copy_(gate.module.weight.roll(1, dims=0))
    assert not same_gates(_print(loaded, ours), _print(other, theirs))


def test_two_experts_swapped_in_one_layer_are_another_model(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = find_gates(other)[0].module.weight
        weight[[2, 6]] = weight[[6, 2]]
    assert not same_gates(_print(model), _print(other))


# a small change of float32 weights is lost where each side has only a different rounding of them
LOADS = [
    (checkpoint, ours, theirs)
    for checkpoint, ours, theirs in itertools.product(DTYPES, repeat=3)
    if checkpoint != torch.float32 or {ours, theirs} != {torch.bfloat16, torch.float16}
]


@pytest.mark.parametrize("checkpoint, ours, theirs", LOADS, ids=str)
def test_a_single_changed_weight_is_another_model(model, checkpoint, ours, theirs):
    loaded = model.to(checkpoint)
    other = _changed(loaded, 0.02)  # a few per cent of a weight
    assert not same_gates(_print(loaded, ours), _print(other, theirs))
    assert not same_gates(_print(other, ours), _print(loaded, theirs))


def test_the_last_bit_of_a_float32_weight_counts(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = find_gates(other)[0].module.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(100.0))
    assert not same_gates(_print(model), _print(other))


def test_a_larger_change_is_seen_even_between_two_roundings_of_float32_weights(model):
    other = _changed(model, 1.0)
    assert not same_gates(_print(model, torch.bfloat16), _print(other, torch.float16))


def test_the_bias_of_a_gpt_oss_router_counts():
    model = tiny_model("gpt_oss")
    other = copy.deepcopy(model)
    with torch.no_grad():
        find_gates(other)[0].module.bias[1] += 0.01
    assert not same_gates(_print(model), _print(other))
    assert not same_gates(_print(model, torch.bfloat16), _print(other, torch.bfloat16))


def test_a_saved_buffer_of_a_gate_counts_and_one_that_is_not_saved_does_not(model):
    """As the selection bias of DeepSeek-V3's router, which is a buffer that checkpoints hold."""
    prints = {}
    for persistent, value in itertools.product((True, False), (0.0, 1.0)):
        other = copy.deepcopy(model)
        for gate in find_gates(other):
            gate.module.register_buffer("selection_bias", torch.full((8,), value), persistent=persistent)
        prints[persistent, value] = _print(other)
        assert same_gates(_print(other, torch.bfloat16), prints[persistent, value])
    assert not same_gates(prints[True, 0.0], prints[True, 1.0])
    assert not same_gates(prints[True, 0.0], _print(model))
    assert prints[False, 0.0] == prints[False, 1.0] == _print(model)


def test_other_seeds_and_shapes_are_other_models(family):
    prints = [
        _print(tiny_model(family, seed=0)),
        _print(tiny_model(family, seed=1)),
        _print(tiny_model(family, num_hidden_layers=3)),
        _print(tiny_model(family, hidden_size=64)),
    ]
    for i, one in enumerate(prints):
        assert [same_gates(one, other) for other in prints] == [i == j for j in range(len(prints))]


def test_other_weights_than_the_gates_do_not_count(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight += 1
    assert same_gates(_print(model), _print(other))
