"""The lab model that is shipped is what its figures say, and its siblings are small enough to ship beside it."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.train import build, held_out
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.probe import probe_model

FOLDER = LAB_MODELS["olmoe"]


@pytest.fixture(scope="module")
def lab():
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)


def test_the_shipped_model_is_a_small_olmoe_with_fine_experts(lab):
    model, _ = lab
    assert type(model) is OlmoeForCausalLM
    gates = find_gates(model)
    assert 4 <= len(gates) == model.config.num_hidden_layers <= 6
    assert all(gate.num_experts >= 32 and gate.top_k == 4 for gate in gates)
    assert 5e6 <= model.num_parameters() <= 9e6
    probe_model(model)


def test_the_shipped_folder_is_small_and_in_bfloat16():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def test_nothing_is_missing_or_left_over_in_the_shipped_weights():
    _, report = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_its_tokenizer_is_its_own(lab):
    model, tokenizer = lab
    assert 4000 <= len(tokenizer) <= model.config.vocab_size == 4096
    text = "def f(x):\n    return x  # naïve\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)


@pytest.mark.parametrize(
    "kind", ["topics", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("python", "tables"))]
)
def test_its_held_out_figures_are_about_what_it_does(lab, kind):
    recorded = json.loads((FOLDER / "held_out.json").read_text())[kind]
    measured = held_out(*lab, kind, limit=4)
    for figures in (recorded, measured):
        assert 0.5 < figures["nll"] < 6 and 0.1 < figures["accuracy"] < 1
    assert measured["nll"] == pytest.approx(recorded["nll"], abs=1.5)


def test_it_knows_what_it_was_trained_on_better_than_the_topics():
    recorded = json.loads((FOLDER / "held_out.json").read_text())
    assert recorded["tables"]["nll"] < recorded["python"]["nll"] < recorded["topics"]["nll"]


@pytest.mark.parametrize(
    "family, class_name", [("qwen3_moe", "Qwen3MoeForCausalLM"), ("gpt_oss", "GptOssForCausalLM")]
)
def test_its_siblings_are_small_models_of_the_other_two_rules(family, class_name):
    model = build(family).eval()
    gates = find_gates(model)
    assert type(model).__name__ == class_name and model.num_parameters() <= 5e6
    assert len(gates) == 4 and {(gate.num_experts, gate.top_k) for gate in gates} == {(32, 4)}
    probe_model(model)


def test_the_recipe_builds_what_is_shipped(lab):
    shipped, recipe = lab[0].state_dict(), build("olmoe").state_dict()
    assert {name: tensor.shape for name, tensor in shipped.items()} == {name: t.shape for name, t in recipe.items()}
    assert len({find_gates(build(family))[0].rule for family in LAB_MODELS}) == 3
