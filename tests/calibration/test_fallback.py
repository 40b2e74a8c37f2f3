"""With nothing to calibrate with, a memory falls back to the confidence 'context', and says so."""

import logging
from dataclasses import replace

import datasets

from knnmoe_hf import RoutingMemory, calibrate
from tests.conftest import random_memory
from tests.memory.helpers import assert_same
from tests.support.domain import domain


def falls_back(caplog, case, memory, background, words: str) -> None:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        same, found = calibrate(case.model, memory, background)
    assert found is None and all(rows.stats is None for rows in same.layers.values())
    assert_same(replace(same, calibration=memory.calibration), memory)
    if any(map(len, background.values())):  # what was read is recorded all the same
        assert set(same.calibration.background) == set(background) and same.calibration.threshold is None
        assert all(text["sha256"] for text in same.calibration.background.values())
    else:
        assert same.calibration is None
    assert words in caplog.text and "falls back to 'context'" in caplog.text


def test_without_background_text_the_memory_falls_back(olmoe, caplog):
    for nothing in ({}, {"empty": []}, {"empty": [], "too": datasets.Dataset.from_list([])}):
        falls_back(caplog, olmoe, olmoe.memory, nothing, "no background text")


def test_background_text_without_targets_is_ignored(olmoe, caplog):
    blank = [{"input_ids": [1, 2, 3], "labels": [-100] * 3, "attention_mask": [1] * 3, "example_id": 0}]
    single = [{"input_ids": [1], "labels": [1], "attention_mask": [1], "example_id": 0}]
    falls_back(caplog, olmoe, olmoe.memory, {"blank": blank, "single": single}, "no background text")
    fitted, found = calibrate(olmoe.model, olmoe.memory, olmoe.given | {"blank": blank, "empty": []})
    assert replace(found, background=olmoe.found.background) == olmoe.found
    assert_same(replace(fitted, calibration=olmoe.found), olmoe.fitted)
    assert found.background["empty"]["examples"] == 0 and found.background["blank"]["tokens"] == 3


def test_a_single_token_of_background_text_gives_stats_that_can_be_saved(olmoe, tmp_path):
    fitted = found = None
    for one in olmoe.background["one"]:
        ids = one["input_ids"][:2]
        single = [{"input_ids": ids, "labels": ids, "attention_mask": [1, 1], "example_id": 0}]
        fitted, found = calibrate(olmoe.model, olmoe.memory, {"single": single})
        if found is not None:  # the memory improves some tokens by chance, and these are no background text
            break
    assert found is not None
    fitted.save_pretrained(tmp_path)
    assert_same(RoutingMemory.from_pretrained(tmp_path), fitted)


def test_background_text_that_the_memory_improves_is_excluded(olmoe, caplog):
    with caplog.at_level(logging.INFO, "knnmoe_hf"):
        calibrate(olmoe.model, olmoe.memory, {"a": domain(8, 77)})
        assert "calibrating with background text 'a' (given): 8 examples" in caplog.text
    falls_back(caplog, olmoe, olmoe.memory, {"a": domain(8, 77), "b": domain(8, 78)}, "helps on all background text")


def test_without_references_to_hold_out_the_memory_falls_back(olmoe, caplog, tmp_path):
    bare = random_memory(olmoe.model)
    few = olmoe.memory.remove_examples(range(7, 48))
    olmoe.memory.save_pretrained(tmp_path, provenance="none")
    falls_back(caplog, olmoe, few, olmoe.background, "no references that can be held out")
    for memory in (bare, RoutingMemory.from_pretrained(tmp_path)):
        falls_back(caplog, olmoe, memory, olmoe.background, "no text of the references, which provenance='ids'")
    assert calibrate(olmoe.model, olmoe.memory.remove_examples(range(8, 48)), olmoe.given)[1] is not None
