"""The configuration of a stranger's memory: what it says of sizes, versions and layers is not believed."""

import sys

import pytest
import torch

from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory, detach_memory
from knnmoe_hf.errors import MemoryMismatchError
from knnmoe_hf.memory.plain_files import LARGEST_JSON
from tests.memory.helpers import edit_config, refused
from tests.memory.hostile.helpers import CONFIG
from tests.support.models import tiny_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and alarms")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda text: text.replace('"rows"', '"rows": 7, "rows"', 1), "'rows' stands there twice"),
        (lambda text: text.replace('"gamma": 0.3', '"gamma": 1e999', 1), "too large"),
        (lambda text: text.replace('"gamma": 0.3', '"gamma": NaN', 1), "NaN"),
        (lambda text: text.replace('"gamma": 0.3', '"gamma": -Infinity', 1), "-Infinity"),
        (lambda text: text.replace('"gamma": 0.3', f'"gamma": {10**300}', 1), "too large"),
        (lambda text: text.replace('"gamma": 0.3', f'"gamma": {"9" * 5000}', 1), "JSON"),
        (lambda text: text.replace('"gamma": 0.3', '"gamma": ' + "[" * 40 + "]" * 40, 1), "32 levels"),
        (lambda text: text.replace('"gamma": 0.3', '"gamma": ' + "[" * 900 + "]" * 900, 1), "32 levels"),
        (lambda text: text + " " * LARGEST_JSON, f"more than {LARGEST_JSON} bytes"),
    ],
)
def test_json_that_means_different_things_to_different_readers_or_too_much(folder, change, reason):
    text = (folder / CONFIG).read_text()
    assert change(text) != text
    (folder / CONFIG).write_text(change(text))
    refused(folder, CONFIG, reason)


def test_a_file_without_end_is_not_read_to_its_end(folder):
    with (folder / CONFIG).open("r+b") as file:
        file.truncate(2**40)  # takes no room on the disk
    refused(folder, CONFIG, "bytes")


@pytest.mark.parametrize(
    "version, needed",
    [
        (99, "install knnmoe_hf 9.9.9 that wrote it, or a later one"),
        (2**62, "install knnmoe_hf 9.9.9"),
        (1, "build the memory anew"),
        (-1, "build the memory anew"),
    ],
)
def test_the_version_that_is_needed_is_named(folder, version, needed):
    def change(config):
        config["memory"] |= {"format_version": version, "library_versions": {"knnmoe_hf": "9.9.9"}}
        config["an_option_of_a_later_version"] = 1

    edit_config(folder, change)
    refused(folder, CONFIG, f"format_version {version}", needed)
    if version > 1:
        with pytest.raises(ValueError, match="install knnmoe_hf 9.9.9"):  # transformers reads the file first
            KNNMoEConfig.from_pretrained(folder)


def test_a_version_of_the_library_is_no_text_of_any_kind(folder):
    versions = {"knnmoe_hf": "from http://evil.example\n"}
    edit_config(folder, lambda c: c["memory"].update(format_version=99, library_versions=versions))
    assert "evil" not in refused(folder, CONFIG, "install the version that wrote it")


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(rows=2**40),
        lambda entry: entry.update(rows=2**62),
        lambda entry: entry.update(rows=-1),
        lambda entry: entry["layers"][0].update(hidden_size=2**40),
        lambda entry: entry["layers"][0].update(num_experts=2**40),
        lambda entry: entry["layers"][0].update(hidden_size=0),
        lambda entry: entry["layers"][0].update(num_experts=0),
        lambda entry: entry["layers"][0].update(sample=[2**40, 4]),
        lambda entry: entry["layers"][0].update(layer=2**40),
        lambda entry: entry["layers"][0].update(scale=1e-300),
        lambda entry: entry["layers"][0].update(scale=1e300),
        lambda entry: entry.update(provenance=[2**62, 2**62, 0]),
    ],
)
@pytest.mark.parametrize("mmap", [True, False])
def test_sizes_that_no_file_has_are_refused_before_anything_is_allocated(folder, change, mmap):
    edit_config(folder, lambda config: change(config["memory"]))
    refused(folder, str(folder), mmap=mmap)


def test_layers_that_are_described_twice_or_that_the_model_lacks(memory, folder):
    edit_config(folder, lambda config: config["memory"]["layers"].append(config["memory"]["layers"][0]))
    refused(folder, CONFIG, "layer 0 is described twice")
    model = tiny_model("olmoe", num_hidden_layers=1)
    with pytest.raises(MemoryMismatchError, match="layer 1, the model has no gate there"):
        attach_memory(model, memory)
    other = tiny_model("olmoe", seed=7)
    with pytest.raises(MemoryMismatchError, match="gates of this OlmoeForCausalLM are not those"):
        attach_memory(other, memory)
    for untouched in (model, other):
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in untouched.modules())


@pytest.mark.parametrize("name", ["hnsw_m", "hnsw_ef_construction", "hnsw_ef_search"])
def test_a_graph_may_not_take_many_times_the_room_or_time_of_the_keys(folder, name):
    edit_config(folder, lambda config: config.update({name: 2**40}))
    refused(folder, name)


def test_the_model_is_untouched_by_a_memory_that_is_refused(folder):
    model, ids = tiny_model("olmoe").eval(), torch.arange(1, 9)[None]
    before = model(input_ids=ids).logits
    edit_config(folder, lambda config: config["memory"].update(rows=39))
    refused(folder, "39")
    with pytest.raises(ValueError, match="no memory is attached"):
        detach_memory(model)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("text", ["\x1b[2J", "a\x00b", "\x07", "\x9b31m", "\x7f"])
def test_no_text_of_a_memory_can_change_the_terminal_that_shows_it(folder, text):
    for place in ("library_versions", "digests"):
        edit_config(folder, lambda config, place=place: config["memory"][place].update({"README.md": text}))
        refused(folder, CONFIG)
        edit_config(
            folder, lambda config, place=place: config["memory"][place].update({"README.md": "\\u001b, \n\t é"})
        )
        RoutingMemory.from_pretrained(folder)


def test_half_a_million_names_of_which_the_last_is_there_twice(folder):
    path = folder / CONFIG
    many = "".join(f'"{number:x}":0,' for number in range(250_000))
    path.write_text(path.read_text().rstrip().removesuffix("}") + f',{many}"0":0}}')
    assert path.stat().st_size < LARGEST_JSON
    refused(folder, CONFIG, "'0' stands there twice")


def test_tens_of_thousands_of_layers_of_which_the_last_is_there_twice(folder):
    def many(content):
        layer = content["memory"]["layers"][0]
        content["memory"]["layers"] = [layer | {"layer": number} for number in [*range(20_000), 19_999]]

    edit_config(folder, many)
    refused(folder, CONFIG, "layer 19999 is described twice")
