"""Finding gates, and the rule of each family."""

import math

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from knnmoe_hf import attach_memory, disable_memory
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.lookup import rules
from knnmoe_hf.models import families, gates
from knnmoe_hf.models.gates import find_decoder, find_gates
from knnmoe_hf.models.probe import probe_model
from tests.conftest import random_memory, tiny_model
from tests.support.attaching import hooks_of
from tests.support.families import family_model

SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4)
SMALL["num_key_value_heads"] = 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def route_by_hand(z: list[float], top_k: int, rule: str) -> dict[int, float]:
    """{expert: weight} of one token's logits, in plain Python."""
    best = sorted(range(len(z)), key=lambda e: -z[e])[:top_k]
    among = best if rule == "topk_softmax" else range(len(z))
    total = sum(math.exp(z[e]) for e in among)
    weights = {e: math.exp(z[e]) / total for e in best}
    scale = sum(weights.values()) if rule == "softmax_topk_renormalized" else 1.0
    return {e: w / scale for e, w in weights.items()}


@pytest.mark.parametrize("rule", ["softmax_topk", "softmax_topk_renormalized", "topk_softmax"])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_a_rule_is_its_formula(rule, top_k):
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    weights, ids = getattr(rules, rule)(logits, top_k)
    for token in range(5):
        wanted = route_by_hand(logits[token].tolist(), top_k, rule)
        assert ids[token].tolist() == list(wanted)
        assert weights[token].tolist() == pytest.approx(list(wanted.values()), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_the_rule_found_is_the_gates_own_to_the_bit(family, dtype, norm_topk_prob):
    options = {} if family == "gpt_oss" else {"norm_topk_prob": norm_topk_prob}
    model = tiny_model(family, **options).to(dtype)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for gate in find_gates(model):
        logits, weights, ids = gate.module(x)
        own_weights, own_ids = gate.rule.routed(logits, gate.top_k, weights.dtype)
        assert own_weights.dtype == weights.dtype == dtype
        assert torch.equal(own_weights, weights) and torch.equal(own_ids, ids)
    probe_model(model)


def test_gates_are_found_on_the_meta_device_in_the_order_of_layers(family):
    with torch.device("meta"):
        model = type(tiny_model(family))(tiny_model(family, num_hidden_layers=12).config)
    gates = find_gates(model)
    assert [gate.layer for gate in gates] == list(range(12))
    assert {(gate.top_k, gate.hidden_size, gate.num_experts) for gate in gates} == {(2, 32, 8)}
    assert all(model.get_submodule(gate.name) is gate.module for gate in gates)
    assert find_decoder(model, gates) is model.model


def test_dense_layers_between_moe_layers_are_skipped_by_index():
    model = tiny_model("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[0, 3])
    assert [gate.layer for gate in find_gates(model)] == [1, 2, 4]
    memory = random_memory(model)
    assert list(memory.layers) == [1, 2, 4]
    attach_memory(model, memory)


def test_gates_are_found_without_a_language_model_head_and_through_wrappers(family):
    model = tiny_model(family)
    bare = AutoModel.from_config(model.config)
    wrapped = get_peft_model(tiny_model(family), LoraConfig(target_modules=["q_proj"]))
    for outer in (bare, wrapped, torch.compile(model, backend="eager")):
        gates = find_gates(outer)
        assert [gate.layer for gate in gates] == [0, 1]
        assert all(outer.get_submodule(gate.name) is gate.module for gate in gates)
        probe_model(outer)
    assert find_decoder(bare, find_gates(bare)) is bare
    assert find_decoder(wrapped, find_gates(wrapped)) is wrapped.get_base_model().model


def test_an_unsupported_model_is_refused_with_the_list_of_supported_ones():
    memory = random_memory(tiny_model("olmoe"))
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM") as error:
        attach_memory(model, memory)
    assert all(row.name in str(error.value) for row in families.FAMILIES)
    assert not hooks_of(model)


def test_a_model_whose_configuration_makes_every_layer_dense_is_told_so():
    for name, dense, router in (
        ("qwen2_moe", dict(mlp_only_layers=[0, 1, 2]), "Qwen2MoeTopKRouter"),
        ("deepseek_v3", dict(first_k_dense_replace=3), "DeepseekV3TopkRouter"),
        ("granitemoehybrid", dict(num_local_experts=0), "GraniteMoeHybridTopKRouter"),
        ("jamba", dict(num_experts=1), "JambaTopKRouter"),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"dense: load a model .* experts \({router}\)") as error:
            find_gates(family_model(name, **dense))
        assert "is not supported" not in str(error.value)


def test_a_model_with_code_of_its_own_is_to_be_loaded_without_it():
    class DeepseekV3ForCausalLM(LlamaForCausalLM):
        """As from `trust_remote_code`: of a supported family by its name, but not of transformers' class."""

    with pytest.raises(UnsupportedModelError, match=r"DeepseekV3ForCausalLM is not .* \(without trust_remote_code\)"):
        find_gates(DeepseekV3ForCausalLM(LlamaConfig(**SMALL)))


class NewTopKRouter(Qwen2MoeTopKRouter.__base__):
    """A router class of a family that is not in the table."""

    __init__, forward = Qwen2MoeTopKRouter.__init__, Qwen2MoeTopKRouter.forward


def of_a_new_family():
    torch.manual_seed(0)
    model = family_model("qwen2_moe")
    for gate in find_gates(model):
        gate.module.__class__ = NewTopKRouter
    model._can_record_outputs = model.model._can_record_outputs = {"router_logits": NewTopKRouter}
    return model


def test_a_row_in_the_table_adds_a_family(monkeypatch):
    model = of_a_new_family()
    with pytest.raises(UnsupportedModelError, match="the router NewTopKRouter at model.layers.0.mlp.gate"):
        find_gates(model)
    row = families.Family("New", "NewTopKRouter", families._by_norm_topk_prob)
    monkeypatch.setattr(gates, "FAMILIES", (*families.FAMILIES, row))
    tokens = torch.arange(20)[None]
    base = model(tokens).logits
    attach_memory(model, random_memory(model))
    assert not torch.equal(model(tokens).logits, base)
    with disable_memory(model):
        assert torch.equal(model(tokens).logits, base)


def test_a_router_that_lacks_what_its_row_names_is_refused():
    model = family_model("deepseek_v3")
    del find_gates(model)[0].module.e_score_correction_bias
    with pytest.raises(UnsupportedModelError, match="is not that of DeepSeek-V3 .*e_score_correction_bias"):
        find_gates(model)


def test_the_weights_of_a_gate_may_be_of_any_name(tokens):
    for name, path in (
        ("hunyuan_v1_moe", "wg.weight"),
        ("afmoe", "gate.weight"),
        ("longcat_flash", "classifier.weight"),
    ):
        gate = find_gates(family_model(name))[0]
        assert gate.weight is gate.module.get_parameter(path)
        assert tuple(gate.weight.shape) == (gate.num_experts, gate.hidden_size)


def test_a_correction_bias_is_found_through_an_adapter_on_the_gate():
    wrapped = get_peft_model(
        family_model("minimax_m2"), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate.weight"])
    )
    for gate in find_gates(wrapped):
        torch.testing.assert_close(gate.rule.bias, gate.caller.e_score_correction_bias, rtol=0, atol=0)
    probe_model(wrapped)


def test_two_towers_with_gates_are_refused():
    both = nn.ModuleDict({name: family_model("olmoe") for name in ("one", "other")})
    with pytest.raises(UnsupportedModelError, match=r"gates in 2 towers, .*other\.model\.layers"):
        find_gates(both)
    # where the last gate of one and the first of the other are in layers of the same number
    both = nn.ModuleDict({name: family_model("olmoe", num_hidden_layers=1) for name in ("one", "other")})
    with pytest.raises(UnsupportedModelError, match=r"gates in 2 towers, .*other\.model\.layers"):
        find_gates(both)


@pytest.mark.parametrize("name", ["afmoe", "ernie4_5_moe"])
def test_a_correction_bias_that_is_offloaded_is_read(name):
    """It is a parameter of the block in one, of a part of the gate in the other."""
    model = family_model(name)
    wanted = [gate.rule.bias.clone() for gate in find_gates(model)]
    cpu_offload(model, execution_device=torch.device("cpu"))
    for gate, bias in zip(find_gates(model), wanted, strict=True):
        assert gate.weight.device.type == "meta" and gate.current_rule().bias.device.type == "meta"
        assert torch.equal(gate.rule.bias, bias)
