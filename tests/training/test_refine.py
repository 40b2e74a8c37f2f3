"""Steps after a build: dropping rows, dropping layers, calibration, with held-out references."""

import copy
import logging
from dataclasses import replace

import pytest
import torch

from knnmoe_hf import RoutingMemory, active_memory, attach_memory, detach_memory, disable_memory, get_memory
from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.evaluation.scores import score
from knnmoe_hf.models.attach import prepare
from knnmoe_hf.training.refine import best_layers
from tests.memory.helpers import assert_same, assert_same_tensors, full_memory
from tests.support.domain import domain, domain_memory
from tests.support.models import random_memory, tiny_model
from tests.support.training import trainer_for


@pytest.fixture
def model():
    return tiny_model("olmoe")


@pytest.fixture
def memory():
    return domain_memory("olmoe")


def held_out_nll(model, memory, held) -> float:
    attach_memory(model, memory, "under test")
    found = score(model, held.rows, 4).mean_nll
    detach_memory(model, "under test")
    return found


def assert_same_rows(judged, unjudged) -> None:
    """All but the verdict is the same."""
    assert judged.verdict is not None and unjudged.verdict is None
    assert_same(replace(judged, verdict=None), unjudged)


def of_layers(memory, layers) -> RoutingMemory:
    return replace(memory, layers={layer: memory.layers[layer] for layer in layers})


# fewer layers


def test_the_layer_that_alone_gains_most_on_held_out_references_is_kept(model, memory, caplog):
    held, before = hold_out(memory), copy.deepcopy(memory)
    nll = {layer: held_out_nll(model, of_layers(memory.take(held.rest), [layer]), held) for layer in memory.layers}
    base = score(model, held.rows, 4).mean_nll
    best = min(nll, key=nll.get)
    attach_memory(model, random_memory(model))  # must not influence the gains
    with caplog.at_level(logging.INFO, "knnmoe_hf"):
        fewer = best_layers(model, prepare(model, memory), 1)
    assert list(fewer) == list(fewer.memory.layers) == fewer.memory.config.layers == [best]
    for layer, value in nll.items():
        assert f"{layer}: {base - value:.6f}"[:-2] in caplog.text
    assert_same_tensors(fewer.memory.layers[best].tensors(), memory.layers[best].tensors())
    assert_same(memory, before)


def test_the_best_layers_come_in_the_model_s_order_and_are_saved(tmp_path):
    model = tiny_model("olmoe", num_hidden_layers=4)
    prepared = prepare(model, full_memory(model, examples=tuple(range(16))))
    fewer = best_layers(model, prepared, 3)
    assert len(fewer) == 3 and list(fewer) == sorted(fewer) == fewer.memory.config.layers
    assert set(best_layers(model, prepared, 2)) < set(fewer)
    fewer.memory.save_pretrained(tmp_path)
    loaded = RoutingMemory.from_pretrained(tmp_path)
    assert_same(loaded, fewer.memory)
    assert set(prepare(model, loaded)) == set(fewer)


def test_all_layers_are_kept_if_num_layers_is_not_smaller_or_nothing_can_be_held_out(model, memory):
    few = memory.remove_examples(range(7, 48))
    for same, count in ((memory, 2), (memory, 5), (few, 1)):
        prepared = prepare(model, same)
        assert best_layers(model, prepared, count) is prepared


def test_choosing_layers_leaves_model_and_attached_memories_unchanged(model, memory):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    best_layers(model, prepare(model, memory), 1)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    mine = random_memory(model)
    attach_memory(model, mine, "mine")
    model.train()
    best_layers(model, prepare(model, memory), 1)
    assert active_memory(model) == "mine" and get_memory(model) is mine
    assert all(part.training for part in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


# through the trainer


def built(model, tmp_path, confidence="context", trainer=None, **arguments):
    references = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in domain(24, 0, length=10)]
    config = dict(confidence=confidence, num_neighbors=4, gamma=0.1)
    options = dict(per_device_train_batch_size=24, builder_steps=3)
    trainer = trainer_for(model, tmp_path, references, config, trainer, **(options | arguments))
    trainer.train()
    assert get_memory(model) is trainer.memory
    detach_memory(model)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = built(tiny_model("olmoe"), tmp_path_factory.mktemp("whole"))
    assert trainer.calibration is None
    return trainer.memory


def test_a_build_keeps_the_rows_that_its_arguments_select(tmp_path, whole, model):
    gain = whole.provenance.nll_before - whole.provenance.nll_after
    assert len(whole) == 24 * 9 and list(whole.layers) == [0, 1]
    assert_same_rows(built(model, tmp_path, max_rows=50).memory, whole.select_rows(max_rows=50))
    some = built(model, tmp_path, min_gain=0.5).memory
    assert 0 < len(some) == int((gain >= 0.5).sum()) < len(whole)
    assert_same_rows(some, whole.select_rows(min_gain=0.5))


def test_rows_are_selected_before_layers_and_the_result_is_what_is_attached_and_saved(tmp_path, whole, model):
    trainer = built(model, tmp_path, max_rows=120, num_layers=1)
    with disable_memory(model):
        wanted = best_layers(model, prepare(model, whole.select_rows(max_rows=120)), 1, 24).memory
    assert_same_rows(trainer.memory, wanted)
    trainer.save_model(str(tmp_path / "saved"))
    assert_same(RoutingMemory.from_pretrained(tmp_path / "saved"), trainer.memory)


def test_the_calibration_comes_last_and_changes_no_row(tmp_path, whole, model):
    text = [{"input_ids": [40 + i for i in one["input_ids"]], "labels": one["labels"]} for one in domain(6, 5)]
    trainer = built(model, tmp_path, "calibrated", dict(ordinary_dataset=text), max_rows=100)
    assert trainer.memory.config.confidence == "calibrated" and trainer.calibration is not None
    for layer, rows in whole.select_rows(max_rows=100).layers.items():
        assert_same_tensors(trainer.memory.layers[layer].tensors(), rows.tensors())
        assert trainer.memory.layers[layer].stats is not None
