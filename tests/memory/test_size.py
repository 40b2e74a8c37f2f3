"""Plans of the released models: their gates and the bytes of a memory, from configurations alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.lookup.rules import softmax_topk, softmax_topk_renormalized, topk_softmax
from knnmoe_hf.memory.size import PUBLISHED, gates_of, plan_memory
from knnmoe_hf.models.gates import find_gates
from tests.support.families import family_model
from tests.support.models import PLAIN, tiny_model

RELEASED = {  # name: gates, hidden size, experts, top-k, rule
    "allenai/OLMoE-1B-7B-0924": (16, 2048, 64, 8, softmax_topk),
    "Qwen/Qwen3-30B-A3B": (48, 2048, 128, 8, softmax_topk_renormalized),
    "openai/gpt-oss-20b": (24, 2880, 32, 4, topk_softmax),
}


@pytest.fixture(scope="module", params=RELEASED)
def released(request):
    return plan_memory(request.param, 1000, KNNMoEConfig()), RELEASED[request.param]


def test_every_gate_of_a_released_model_is_found_with_its_rule_and_sizes(released):
    planned, (count, hidden, experts, top_k, rule) = released
    assert [gate.layer for gate in planned.gates] == list(range(count))
    for gate in planned.gates:
        assert (gate.hidden_size, gate.num_experts, gate.top_k, gate.rule) == (hidden, experts, top_k, rule)
        assert all(parameter.device.type == "meta" for parameter in gate.module.parameters())


def test_a_plan_counts_the_bytes_of_keys_and_values(released):
    planned, (count, hidden, experts, _, _) = released
    codec = 48 * hidden * 4 + 2 * 48 * 4 + hidden * 4  # axes, bias and step, mean
    sparse = 1000 * (16 * 2 + 2) + 2 * 4  # sixteen numbers, their experts, the rest; one step and one offset
    keys, values = 1000 * 48 + codec + 512 * 16 * 4, sparse if experts > 34 else (1000 + 2 * 4) * experts
    assert planned.key_bytes == dict.fromkeys(range(count), keys)
    assert planned.value_bytes == dict.fromkeys(range(count), values)
    assert planned.nbytes == count * (keys + values) and planned.tokens == 1000


def test_a_plan_in_the_paper_s_own_form_counts_every_number_as_float32():
    planned = plan_memory("allenai/OLMoE-1B-7B-0924", 1000, KNNMoEConfig(**PLAIN))
    assert planned.key_bytes == dict.fromkeys(range(16), 1000 * 2048 * 4 + 512 * 16 * 4)
    assert planned.value_bytes == dict.fromkeys(range(16), 1000 * 64 * 4)


def test_there_are_the_three_published_models():
    assert list(PUBLISHED) == list(RELEASED)
    sizes = {}
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            sizes[name] = AutoModelForCausalLM.from_config(config).num_parameters() / 1e9
    assert list(sizes.values()) == pytest.approx([6.92, 30.53, 20.91], abs=0.01)


def memory_of(model, rows: int, **options) -> RoutingMemory:
    config = KNNMoEConfig(**(PLAIN | dict(num_neighbors=4) | options))
    sizes = {gate.layer: (gate.hidden_size, gate.num_experts) for gate in find_gates(model)}
    generator = torch.Generator().manual_seed(0)
    keys, values = (
        {layer: torch.randn(rows, size[side], generator=generator) for layer, size in sizes.items()} for side in (0, 1)
    )
    return RoutingMemory.from_rows(config, keys, values, model)


@pytest.fixture
def folder(tmp_path):
    tiny_model("olmoe").config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_key_dtype_and_layers_make_a_plan_smaller(folder):
    options = PLAIN | dict(key_dtype="bfloat16", layers=[1], num_neighbors=4)
    half = plan_memory(folder, 10, KNNMoEConfig(**options))
    assert half.key_bytes == {1: 10 * 32 * 2 + 10 * 4 * 4} and half.value_bytes == {1: 10 * 8 * 4}
    assert [gate.layer for gate in half.gates] == [1]


STORED = {
    "paper": {},
    "default": {name: KNNMoEConfig().options()[name] for name in PLAIN},
    "sparse": dict(key_codec="pca", key_dim=5, key_dtype="float16", value_dtype="int8", value_experts=2),
    "sparse delta": dict(key_codec="logits", key_dtype="int8", value_experts=2, value_space="delta"),
}


@pytest.mark.parametrize("rows", [0, 30, 700])
@pytest.mark.parametrize("form", STORED)
def test_a_plan_is_as_large_as_the_memory(family, form, rows, tmp_path):
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    memory = memory_of(model, rows, **STORED[form])
    planned = plan_memory(str(tmp_path), rows, memory.config)
    sizes = {layer: planned.key_bytes[layer] + planned.value_bytes[layer] for layer in planned.key_bytes}
    assert sizes == memory.nbytes_per_layer


def test_no_tokens_take_no_bytes(folder):
    assert plan_memory(folder, 0, KNNMoEConfig(**PLAIN)).nbytes == 0


def test_what_cannot_be_planned_is_refused(folder):
    with pytest.raises(ValueError, match="tokens=-1 is not allowed"):
        plan_memory(folder, -1, KNNMoEConfig())
    with pytest.raises(ValueError, match=r"\[7\] have no gate, choose among \[0, 1\]"):
        plan_memory(folder, 1, KNNMoEConfig(layers=[0, 7]))


def test_a_model_without_a_supported_router_is_refused(tmp_path):
    GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel is not supported"):
        plan_memory(str(tmp_path), 1, KNNMoEConfig())


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "deepseek_v3", "afmoe"])
def test_the_gates_of_every_kind_of_model_are_known_from_its_configuration(name):
    model = family_model(name)
    found = gates_of(model.config, name)
    wanted = find_gates(model)
    sizes = [(gate.layer, gate.hidden_size, gate.num_experts, gate.top_k) for gate in wanted]
    assert [(gate.layer, gate.hidden_size, gate.num_experts, gate.top_k) for gate in found] == sizes
    assert [gate.rule for gate in found] == [gate.rule for gate in wanted]
