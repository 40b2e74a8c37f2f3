"""A memory is frozen: nothing of it can be replaced, nothing mutable is shared, edits make another one."""

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from knnmoe_hf import RoutingMemory
from knnmoe_hf.errors import MemoryMismatchError
from tests.memory.helpers import assert_same, calibration_record, full_memory
from tests.support.models import tiny_model
from tests.support.stats import with_stats

MODEL = tiny_model("olmoe")
KEEP = torch.arange(40) < 20
EDITS = {  # whether the calibration still holds afterwards
    "replace": (lambda memory: replace(memory), True),
    "copy": (copy.copy, True),
    "deepcopy": (copy.deepcopy, True),
    "pickle": (lambda memory: pickle.loads(pickle.dumps(memory)), True),
    "take": (lambda memory: memory.take(KEEP), True),
    "select_rows": (lambda memory: memory.select_rows(max_rows=9), True),
    "remove_examples": (lambda memory: memory.remove_examples([1]), True),
    "merge": (lambda memory: memory.merge(full_memory(MODEL, examples=(7, 8), seed=3)), False),
    "recoded": (lambda memory: memory.recoded(MODEL), False),
}


@pytest.fixture
def memory() -> RoutingMemory:
    return replace(with_stats(full_memory(MODEL)), calibration=calibration_record())


@pytest.mark.parametrize("name", ["config", "layers", "origin", "provenance", "tokenizer", "calibration"])
def test_nothing_of_a_memory_can_be_replaced(memory, name):
    with pytest.raises(FrozenInstanceError, match=name):
        setattr(memory, name, None)


def test_layers_can_neither_be_replaced_nor_removed(memory):
    rows = memory.layers[0]
    with pytest.raises(TypeError):
        memory.layers[0] = rows
    with pytest.raises(TypeError):
        del memory.layers[0]
    given = {1: rows, 0: rows}
    made = replace(memory, layers=given)
    given.pop(0)
    assert list(made.layers) == [0, 1]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_memory_shares_nothing_mutable_with_the_one_that_it_was_made_of(memory, edit):
    before = copy.deepcopy(memory)
    edited = EDITS[edit][0](memory)
    edited.config.gamma, edited.config.layers[0] = 9.0, 5
    edited.origin.options["key_dim"] = 1
    edited.origin.base_model_fingerprint["norms"].clear()
    if edited.calibration is not None:
        edited.calibration.harm["python"] = 9.0
        edited.calibration.background["law"]["files"].append("c.py")
    assert memory.config.gamma == 0.3 and memory.config.layers == [0, 1]
    assert_same(memory, before)


@pytest.mark.parametrize("edit", EDITS)
def test_a_calibration_is_kept_exactly_as_long_as_its_stats(memory, edit):
    edited = EDITS[edit][0](memory)
    assert (edited.calibration == memory.calibration) is EDITS[edit][1]
    for rows in edited.layers.values():
        assert (rows.stats is not None) is EDITS[edit][1]
    if not EDITS[edit][1]:
        assert edited.calibration is None


@pytest.mark.parametrize("edit", ["copy", "deepcopy", "pickle"])
def test_a_copy_is_the_same_memory(memory, edit):
    assert_same(EDITS[edit][0](memory), memory)


def test_the_configuration_lists_the_layers_that_there_are(memory, tmp_path):
    second = replace(memory, layers={1: memory.layers[1]})
    assert second.config.layers == [1] and memory.config.layers == [0, 1]
    second.save_pretrained(tmp_path)
    assert_same(RoutingMemory.from_pretrained(tmp_path), second)
    assert replace(memory, layers={}).config.layers is None


def test_other_layers_in_the_configuration_than_there_are_rows_for_are_refused(memory, tmp_path):
    memory.config.layers = [1, 0]
    memory.check_config()
    memory.config.layers = [1]
    for call in (memory.check_config, lambda: memory.save_pretrained(tmp_path / "new")):
        with pytest.raises(MemoryMismatchError, match=r"config.layers=\[1\] are not the layers .* \[0, 1\]") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
