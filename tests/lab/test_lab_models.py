"""The lab model that is shipped is what its figures say, and so are its siblings, one for each other routing rule."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.train import ExpertLoad, build, held_out, routers
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.probe import probe_model

FOLDER = LAB_MODELS["olmoe"]
SIBLINGS = [family for family in LAB_MODELS if family != "olmoe"]
BIAS = "e_score_correction_bias"


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


@pytest.fixture(scope="module", params=SIBLINGS)
def sibling(request):
    """A model of another routing rule, as it lies in the repository."""
    folder = LAB_MODELS[request.param]
    options = dict(dtype=torch.float32, output_loading_info=True)
    model, report = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return request.param, model.eval(), AutoTokenizer.from_pretrained(folder)


def test_its_siblings_are_small_and_have_a_memory_in_every_router(sibling):
    family, model, tokenizer = sibling
    assert model.config.model_type == family and model.num_parameters() <= 5e6
    gates = find_gates(model)
    assert len(gates) >= 3 and {gate.top_k for gate in gates} == {4} and min(gate.num_experts for gate in gates) >= 16
    probe_model(model)
    shared = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.get_vocab() == shared.get_vocab() and model.config.eos_token_id == tokenizer.eos_token_id


def test_its_siblings_lie_beside_the_package_with_figures_and_a_card(sibling):
    folder = LAB_MODELS[sibling[0]]
    assert folder.parent.name == "model_cards" and folder.name == f"lab-{sibling[0].replace('_', '-')}"
    assert (folder / "model.safetensors").stat().st_size <= 10 * 2**20
    with safe_open(folder / "model.safetensors", "pt") as weights:
        dtypes = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith(BIAS)} == {"BF16"}
    assert {dtype for name, dtype in dtypes.items() if name.endswith(BIAS)} <= {"F32"}
    figures, card = json.loads((folder / "held_out.json").read_text()), (folder / "README.md").read_text()
    results = {(one.dataset_config, one.metric_type): one.metric_value for one in ModelCard(card).data.eval_results}
    for kind in ("python", "tables", "topics"):
        assert results[kind, "nll"] == pytest.approx(figures[kind]["nll"], abs=1e-4)
        assert f"| {figures[kind]['nll']:.3f} | {100 * figures[kind]['accuracy']:.1f} % |" in card


def test_its_siblings_know_what_they_were_trained_on_better_than_the_topics(sibling):
    recorded = json.loads((LAB_MODELS[sibling[0]] / "held_out.json").read_text())
    assert recorded["tables"]["nll"] < recorded["python"]["nll"] < recorded["topics"]["nll"]
    measured = held_out(*sibling[1:], "topics", limit=2)
    assert measured["nll"] == pytest.approx(recorded["topics"]["nll"], abs=1.5)


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "ernie4_5_moe"])
def test_correction_biases_decide_and_even_the_load_out(family):
    model = AutoModelForCausalLM.from_pretrained(LAB_MODELS[family], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODELS[family])
    trained = ExpertLoad(model)
    held_out(model, tokenizer, "python", limit=8)
    trained.remove()
    for _, bias in routers(model):
        assert bias.dtype == torch.float32 and bias.std() > 0.01
        bias.data.zero_()
    without = ExpertLoad(model)
    held_out(model, tokenizer, "python", limit=8)
    assert trained.shares().std() < 0.7 * without.shares().std()


@pytest.mark.parametrize("family", LAB_MODELS)
def test_the_recipe_builds_what_is_there(family):
    there, recipe = AutoModelForCausalLM.from_pretrained(LAB_MODELS[family]).state_dict(), build(family).state_dict()
    assert {name: tensor.shape for name, tensor in there.items()} == {name: t.shape for name, t in recipe.items()}


def test_every_lab_model_has_another_routing_rule():
    assert len({find_gates(build(family))[0].rule for family in LAB_MODELS}) == len(LAB_MODELS) == 7
