"""A calibration leaves the model, its other memories and the memory that it is given as they were."""

import copy

import pytest
import torch

from knnmoe_hf import RoutingMemory, active_memory, attach_memory, calibrate, detach_memory, disable_memory, get_memory
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.models.hooks import RoutingHooks
from tests.calibration.helpers import harm
from tests.conftest import random_memory
from tests.memory.helpers import assert_same
from tests.support.domain import domain_memory


def test_calibration_works_inside_disable_memory(olmoe):
    attach_memory(olmoe.model, olmoe.memory)
    try:
        with disable_memory(olmoe.model):
            assert calibrate(olmoe.model, olmoe.memory, olmoe.given)[1] == olmoe.found
            assert not RoutingHooks.of(olmoe.model).current
    finally:
        detach_memory(olmoe.model)


def test_calibration_restores_the_model_and_leaves_its_memory_unchanged(case):
    model = case.model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model.model.layers[0].eval()
    modes = {name: part.training for name, part in model.named_modules()}
    memory = domain_memory(model.config.model_type, "calibrated")
    before = copy.deepcopy(memory)
    fitted, found = calibrate(model, memory, case.given)
    assert RoutingHooks.of(model) is None
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())
    model.eval()
    assert_same(memory, before)
    assert found == case.found  # although the model was in training mode
    assert_same(fitted, case.fitted)
    assert fitted.config.confidence == "calibrated" and len(fitted) == len(memory)


def test_attached_memories_stay_attached_and_have_no_influence(case):
    model, ids = case.model, torch.arange(24)[None]
    for name, seed in (("first", 1), ("second", 2)):
        attach_memory(model, random_memory(model, seed=seed), name)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    kept = get_memory(model, "first"), get_memory(model, "second")
    fitted, found = calibrate(model, case.memory, case.given)
    assert found == case.found
    assert_same(fitted, case.fitted)
    assert active_memory(model) == "second"
    assert (get_memory(model, "first"), get_memory(model, "second")) == kept
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted)
    detach_memory(model)


def test_a_memory_that_is_attached_itself_can_be_calibrated(olmoe):
    attach_memory(olmoe.model, olmoe.memory)
    try:
        assert calibrate(olmoe.model, olmoe.memory, olmoe.given)[1] == olmoe.found
        assert get_memory(olmoe.model) is olmoe.memory and active_memory(olmoe.model) == "default"
    finally:
        detach_memory(olmoe.model)


def test_a_calibrated_memory_can_be_calibrated_again(olmoe):
    again, found = calibrate(olmoe.model, olmoe.fitted, olmoe.given)
    assert found == olmoe.found
    assert_same(again, olmoe.fitted)


def test_a_calibration_is_saved_with_the_memory(case, tmp_path):
    case.fitted.save_pretrained(tmp_path)
    loaded = RoutingMemory.from_pretrained(tmp_path)
    assert_same(loaded, case.fitted)
    assert all(isinstance(rows.stats, CalibrationStats) for rows in loaded.layers.values())
    assert harm(case.model, loaded, case.background["one"]) == harm(case.model, case.fitted, case.background["one"])
    bare = RoutingMemory.from_pretrained(tmp_path, layers=[1])
    assert bare.layers[1].stats == case.fitted.layers[1].stats


def test_results_do_not_depend_on_how_background_text_is_batched(olmoe):
    """Rows of different lengths, so that other batches have other padding."""
    cut = [
        {name: column[:length] if name != "example_id" else column for name, column in one.items()}
        for one, length in zip(olmoe.background["one"], [24, 9, 17, 2] * 6)
    ]
    fitted, found = calibrate(olmoe.model, olmoe.memory, {"cut": cut})
    other, alike = calibrate(olmoe.model, olmoe.memory, {"cut": sorted(cut, key=lambda one: len(one["labels"]))})
    assert found.threshold == alike.threshold and found.harm["cut"] == pytest.approx(alike.harm["cut"], abs=1e-4)
    for layer, rows in fitted.layers.items():
        assert vars(rows.stats) == pytest.approx(vars(other.layers[layer].stats), rel=1e-3)
