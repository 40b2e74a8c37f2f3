"""Memories of older versions of the format are opened as what they are, or refused."""

from dataclasses import replace

import pytest

from knnmoe_hf import RoutingMemory
from knnmoe_hf.memory.card_data import CardData
from tests.memory.helpers import assert_same, edit_config, full_memory, read_config, refused
from tests.memory.manifest.helpers import STATS, as_version_2, as_version_3, as_version_4, as_version_5, from_version_4
from tests.support.models import tiny_model


def test_a_memory_of_version_2_is_opened_as_what_it_is(calibrated, folder, tmp_path):
    edit_config(folder, as_version_2)
    assert read_config(folder)["memory"]["layers"][1]["levels"]["own"] == 0.6
    loaded = RoutingMemory.from_pretrained(folder)
    assert_same(loaded, replace(from_version_4(calibrated), calibration=None))
    for name, value in (STATS | {"background_open_shift": STATS["open_shift"]}).items():
        assert getattr(loaded.layers[1].stats, name) == value
    loaded.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again")["memory"]["format_version"] == 6
    assert_same(RoutingMemory.from_pretrained(tmp_path / "again"), loaded)


def test_a_memory_of_version_3_is_opened_as_what_it_is(calibrated, folder, tmp_path):
    edit_config(folder, as_version_3)
    loaded = RoutingMemory.from_pretrained(folder)
    assert_same(loaded, from_version_4(calibrated))
    loaded.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again")["memory"]["format_version"] == 6


def test_a_memory_of_version_4_is_opened_as_what_it_is(calibrated, folder, tmp_path):
    edit_config(folder, as_version_4)
    loaded = RoutingMemory.from_pretrained(folder)
    assert_same(loaded, from_version_4(calibrated))
    loaded.save_pretrained(tmp_path / "again")
    assert_same(RoutingMemory.from_pretrained(tmp_path / "again"), loaded)


def test_a_memory_of_version_5_is_opened_as_what_it_is(calibrated, folder, tmp_path):
    edit_config(folder, as_version_5)
    loaded = RoutingMemory.from_pretrained(folder)
    assert_same(loaded, calibrated)
    assert loaded.card_data == CardData()


def test_a_memory_of_version_3_without_provenance_is_opened(calibrated, tmp_path):
    calibrated.save_pretrained(tmp_path, provenance="none")
    edit_config(tmp_path, lambda config: config["memory"].update(format_version=3))
    edit_config(tmp_path, lambda config: config["memory"].pop("digests"))
    assert RoutingMemory.from_pretrained(tmp_path).provenance is None


def test_a_memory_of_version_2_without_levels_is_opened(tmp_path):
    memory = full_memory(tiny_model("olmoe"))
    memory.save_pretrained(tmp_path)
    edit_config(tmp_path, as_version_2)
    assert_same(RoutingMemory.from_pretrained(tmp_path), memory)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["layers"][0]["levels"].update(own=0.1),
        lambda entry: entry["layers"][0]["levels"].pop("fall"),
        lambda entry: entry["layers"][0]["levels"].update(more=1.0),
        lambda entry: entry["layers"][0].update(levels=[]),
        lambda entry: entry["layers"][0].pop("levels"),
        lambda entry: entry.update(layers=[3]),
        lambda entry: entry.update(layers="x"),
    ],
)
def test_a_broken_memory_of_version_2_is_refused(folder, change):
    edit_config(folder, as_version_2)
    edit_config(folder, lambda config: change(config["memory"]))
    refused(folder, "config.json")


def test_a_memory_of_version_2_that_was_edited_is_found_by_its_seal(folder):
    edit_config(folder, as_version_2)
    edit_config(folder, lambda config: config["memory"]["layers"][0]["levels"].update(own=0.7), sealed=False)
    refused(folder, "config.json", "it was edited")


@pytest.mark.parametrize("version", [1, 7, 2.0, "3", True])
def test_a_memory_of_another_version_is_refused(folder, version):
    edit_config(folder, lambda config: config["memory"].update(format_version=version))
    refused(folder, "config.json", "format_version")
