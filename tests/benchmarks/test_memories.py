"""One build gives the memories of all settings."""

import pytest
import torch

from benchmarks import memories as module
from benchmarks.memories import Memories
from benchmarks.settings import RAW, Setting
from knnmoe_hf.lookup.mixing import scatter_assignment
from knnmoe_hf.models.gates import find_gates, gate_logits
from knnmoe_hf.training.data import prepare_dataset
from tests.conftest import tiny_model
from tests.support.tokenizers import byte_tokenizer
from tests.support.training import examples

QUICK = {"builder_steps": 2}


def setting(references: int = 8, optimised: bool = True, build: dict | None = None, **config) -> Setting:
    config = RAW | {"confidence": "rbf"} | config
    return Setting("s", "g", config=config, build=QUICK | (build or {}), optimised=optimised, references=references)


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe")


@pytest.fixture
def made(model, monkeypatch):
    rows = prepare_dataset(examples(count=8, length=10), None, None)
    monkeypatch.setattr(module, "background_rows", lambda tokenizer: {"plain": rows[:2], "python": rows[2:4]})
    return Memories(model, byte_tokenizer(), rows, seed=0)


def test_fewer_references_give_what_a_build_of_fewer_would(made, model):
    alone = Memories(model, byte_tokenizer(), made.references[:3], seed=0).make(setting())[0]
    made.make(setting())
    few = made.make(setting(references=3))[0]
    assert len(few) == len(alone) < len(made.make(setting())[0])
    assert few.provenance.example_ids.unique().tolist() == [0, 1, 2]
    for layer, rows in alone.layers.items():
        torch.testing.assert_close(few.layers[layer].decoded_keys, rows.decoded_keys)
        torch.testing.assert_close(few.layers[layer].decoded_values, rows.decoded_values, atol=1e-2, rtol=1e-2)


def test_more_references_add_to_a_build(made, monkeypatch):
    built = []
    plain = Memories._build
    monkeypatch.setattr(
        Memories, "_build", lambda self, b, start, stop: built.append((start, stop)) or plain(self, b, start, stop)
    )
    for references in (3, 8, 5, 100):
        made.make(setting(references=references))
    assert built == [(0, 3), (3, 8)]
    made.make(setting(build={"max_rows": 5}))
    assert built == [(0, 3), (3, 8)]
    made.make(setting(build={"builder": "topk"}))
    assert built[2:] == [(0, 8)]


def test_time_is_in_proportion_to_the_references(made):
    whole, half = (made._rows(setting(references=n)).seconds for n in (8, 4))
    assert half == pytest.approx(whole / 2)


def test_unoptimised_values_are_the_gates_own(made, model):
    memory = made.make(setting(optimised=False))[0]
    best = made.make(setting())[0]
    for gate in find_gates(model):
        rows = memory.layers[gate.layer]
        torch.testing.assert_close(rows.decoded_values, gate_logits(gate, rows.decoded_keys))
        assert torch.equal(rows.decoded_keys, best.layers[gate.layer].decoded_keys)
        assert not torch.allclose(rows.decoded_values, best.layers[gate.layer].decoded_values)


def test_values_are_those_of_the_space(made, model):
    spaces = {space: made.make(setting(value_space=space))[0] for space in ("logits", "delta", "assignment")}
    for gate in find_gates(model):
        optimised = spaces["logits"].layers[gate.layer].decoded_values
        own = gate_logits(gate, spaces["logits"].layers[gate.layer].decoded_keys)
        torch.testing.assert_close(spaces["delta"].layers[gate.layer].decoded_values, optimised - own)
        assignment = scatter_assignment(*gate.rule(optimised, gate.top_k), gate.num_experts)
        torch.testing.assert_close(spaces["assignment"].layers[gate.layer].decoded_values, assignment)


def test_rows_and_layers_are_chosen_as_in_a_build(made):
    assert len(made.make(setting(build={"max_rows": 5}))[0]) == 5
    assert len(made.make(setting(build={"num_layers": 1}))[0].layers) == 1
