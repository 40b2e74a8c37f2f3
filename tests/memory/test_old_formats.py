"""Memories of each older format, as the code of their time wrote them (tests/memory/data), work as they did."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from knnmoe_hf import RoutingMemory, attach_memory, detach_memory
from knnmoe_hf.memory.versions import FORMAT_VERSION
from tests.memory.helpers import assert_same, edit_config, refused

DATA = Path(__file__).parent / "data"
FORMATS = sorted(path.name for path in DATA.glob("format_*"))
WITH_CALIBRATION = [name for name in FORMATS if name != "format_2_first"]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DATA / "model", dtype=torch.float32)


def logits(model, memory: RoutingMemory | None, ids: torch.Tensor) -> torch.Tensor:
    if memory is not None:
        attach_memory(model, memory)
    try:
        with torch.no_grad():
            return model(input_ids=ids).logits
    finally:
        if memory is not None:
            detach_memory(model)


def test_there_is_a_memory_of_every_older_format():
    versions = {json.loads((DATA / name / "config.json").read_text())["memory"]["format_version"] for name in FORMATS}
    assert versions == set(range(2, FORMAT_VERSION))


@pytest.mark.parametrize("name", WITH_CALIBRATION)
def test_a_memory_of_an_older_format_gives_the_logits_that_its_writer_computed(name, model):
    memory, expected = RoutingMemory.from_pretrained(DATA / name), load_file(DATA / name / "expected.safetensors")
    assert len(memory) == 368 and list(memory.layers) == [0, 1] and memory.config.confidence == "calibrated"
    assert all(rows.stats is not None for rows in memory.layers.values()) and memory.provenance.has_text
    found = logits(model, memory, expected["input_ids"])
    torch.testing.assert_close(found, expected["logits"], rtol=1e-4, atol=1e-4)
    assert float((found - logits(model, None, expected["input_ids"])).abs().max()) > 1


def test_the_first_memories_of_format_2_open_without_their_calibration(model, caplog):
    folder = DATA / "format_2_first"
    memory, expected = RoutingMemory.from_pretrained(folder), load_file(folder / "expected.safetensors")
    assert len(memory) == 368 and all(rows.stats is None for rows in memory.layers.values())
    found = logits(model, memory, expected["input_ids"])
    assert "the memory holds no calibration" in caplog.text
    assert bool(found.isfinite().all()) and not torch.equal(found, logits(model, None, expected["input_ids"]))


def test_the_mean_that_the_first_memories_of_format_2_lack_is_found_from_the_bias(model):
    memory = RoutingMemory.from_pretrained(DATA / "format_2_first")
    for rows in memory.layers.values():
        mean = rows.encoder.mean[None]
        torch.testing.assert_close(rows.encoder.query(mean, mean), torch.zeros(1, 8), atol=1e-4, rtol=0)
    recoded = memory.recoded(model, key_dtype="float32")
    for layer, rows in recoded.layers.items():
        torch.testing.assert_close(rows.scale, memory.layers[layer].scale, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_memory_of_an_older_format_is_saved_in_the_present_one(name, tmp_path):
    memory = RoutingMemory.from_pretrained(DATA / name)
    memory.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["memory"]["format_version"] == FORMAT_VERSION
    assert_same(RoutingMemory.from_pretrained(tmp_path), memory)


@pytest.mark.parametrize("name", FORMATS)
def test_a_memory_of_an_older_format_is_edited_and_merged(name):
    memory = RoutingMemory.from_pretrained(DATA / name)
    left = memory.remove_examples([0, 5])
    assert len(left) == 368 - 2 * 23 and len(left.merge(memory)) == 368


@pytest.mark.parametrize("name", FORMATS)
def test_an_older_memory_that_was_edited_is_refused(name, tmp_path):
    shutil.copytree(DATA / name, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, lambda config: config["memory"].update(rows=369), sealed=False)
    refused(tmp_path, "config.json")


def test_a_shard_that_lacks_a_mean_is_refused_where_the_format_has_one(tmp_path):
    shutil.copytree(DATA / "format_2_first", tmp_path, dirs_exist_ok=True)

    def as_if_of_format_3(config: dict) -> None:
        entry = config["memory"]
        entry |= {"format_version": 3, "calibration": None}
        entry["layers"] = [{n: v for n, v in e.items() if n != "levels"} | {"stats": None} for e in entry["layers"]]

    edit_config(tmp_path, as_if_of_format_3)
    refused(tmp_path, "encoder.mean")
