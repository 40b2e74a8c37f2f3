"""A saved memory: what it consists of, that a save is all or nothing."""

import json
import multiprocessing
import os
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors import safe_open

from knnmoe_hf import RoutingMemory
from knnmoe_hf.lookup.options import FIXED_AT_BUILD
from knnmoe_hf.memory import folder as folder_files
from knnmoe_hf.memory import storage
from knnmoe_hf.memory.card import model_card
from knnmoe_hf.memory.fingerprint import tokenizer_fingerprint
from tests.memory.helpers import (
    assert_same,
    background,
    calibration_record,
    contents,
    full_memory,
    read_config,
    shards,
    tiny_tokenizer,
)
from tests.support.models import tiny_model
from tests.support.stats import with_stats


def memory_of(model) -> RoutingMemory:
    model.config.name_or_path = "me/tiny-moe"
    return full_memory(model, tokenizer=tiny_tokenizer(), base_model_revision="c0ffee")


@pytest.fixture
def memory():
    return memory_of(tiny_model("olmoe"))


@pytest.fixture
def folder(memory, tmp_path):
    memory.save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"


def test_config_says_what_the_memory_is_and_belongs_to(model, tmp_path):
    memory, folder = memory_of(model), tmp_path
    memory.save_pretrained(folder)
    config = read_config(folder)
    assert config["model_type"] == "knn_moe" and config["value_space"] == "logits"
    assert config["base_model_name_or_path"] == "me/tiny-moe" and config["base_model_revision"] == "c0ffee"
    about = config["memory"]
    assert about["origin"]["base_model_class"] == type(model).__name__
    assert about["origin"]["base_model_fingerprint"] == memory.origin.base_model_fingerprint
    assert about["origin"]["tokenizer_fingerprint"] == tokenizer_fingerprint(memory.tokenizer)
    assert about["origin"]["reference_set_hash"] == "5e7" * 16
    assert about["rows"] == 40 and about["provenance"] == [4, 44, 0]
    assert about["format_version"] == 6 and about["next_tokens"] is False and about["calibration"] is None
    scales = {entry["layer"]: entry.pop("scale") for entry in about["layers"]}
    sizes = {"hidden_size": 32, "num_experts": 8, "sample": [40, 4], "stats": None}
    assert about["layers"] == [{"layer": i} | sizes for i in (0, 1)]
    assert about["origin"]["options"] == {name: getattr(memory.config, name) for name in FIXED_AT_BUILD}
    assert scales == {layer: rows.scale for layer, rows in memory.layers.items()}
    assert about["library_versions"]["torch"] == torch.__version__
    assert {"knnmoe_hf", "transformers", "safetensors"} <= set(about["library_versions"])
    digests = contents(folder)
    beside = [name for name in digests if name != "config.json" and not name.endswith(".safetensors")]
    assert about["digests"] == {name: digests[name] for name in beside} and "README.md" in beside
    assert {entry["name"]: entry["sha256"] for entry in about["files"]} == {
        path.name: digests[path.name] for path in shards(folder)
    }


def test_the_base_models_commit_is_read_from_the_cache_unless_it_is_given(tmp_path, monkeypatch):
    cached = tmp_path / "models--me--tiny-moe"
    (cached / "snapshots" / "5ca1ab1e").mkdir(parents=True)
    (cached / "snapshots" / "5ca1ab1e" / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("5ca1ab1e")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tiny_model("olmoe")
    model.config.name_or_path = "me/tiny-moe"
    assert full_memory(model).config.base_model_revision == "5ca1ab1e"
    assert full_memory(model, base_model_revision="c0ffee").config.base_model_revision == "c0ffee"


def test_folder_holds_safetensors_json_and_text_only(folder):
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json", ".md"}
    assert {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json"} <= set(contents(folder))
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    for path in shards(folder):
        with safe_open(path, framework="pt") as shard:
            assert list(shard.keys())


def test_card_names_the_base_model_where_it_is_a_repository(memory, folder, tmp_path):
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "me/tiny-moe" and card.data.library_name == "knnmoe_hf"
    assert "40 reference tokens of 4 examples" in card.text
    memory.config.base_model_name_or_path = "/gone/with/the/wind"
    memory.save_pretrained(tmp_path / "local")
    assert ModelCard.load(tmp_path / "local" / "README.md").data.base_model is None


def test_card_names_the_text_that_a_calibration_has_read(memory):
    def line(memory) -> str:
        (found,) = [line for line in model_card(memory).splitlines() if line.startswith("| calibrated against")]
        return found

    assert line(memory) == "| calibrated against | nothing |"
    fitted = with_stats(memory)
    assert line(fitted) == "| calibrated against | not recorded |"  # by a version that kept no record
    kinds = {"b": background(), "law": background("given"), "a": background()}
    recorded = replace(fitted, calibration=calibration_record(harm={}, excluded=[], background=kinds, fits={}))
    said = "`law` (given by its builder); `a`, `b` (found on the machine that built it)"
    assert line(recorded) == f"| calibrated against | {said} |"


def test_large_memories_are_sharded_with_an_index(memory, tmp_path):
    memory.save_pretrained(tmp_path, max_shard_size=3000)
    assert len(shards(tmp_path)) > 2
    index = json.loads((tmp_path / "memory.safetensors.index.json").read_text())
    held = {}
    for path in shards(tmp_path):
        with safe_open(path, framework="pt") as shard:
            sizes = {key: shard.get_tensor(key).nbytes for key in shard.keys()}
        assert len(sizes) == 1 or sum(sizes.values()) <= 3000
        held |= {key: path.name for key in sizes}
    assert index["weight_map"] == held
    assert_same(RoutingMemory.from_pretrained(tmp_path), memory)


@pytest.mark.parametrize("size", ["2GB", 3000])
def test_same_memory_gives_the_same_bytes_also_after_loading(memory, tmp_path, size):
    memory.save_pretrained(tmp_path / "one", max_shard_size=size)
    memory.save_pretrained(tmp_path / "two", max_shard_size=size)
    memory.save_pretrained(tmp_path / "two", max_shard_size=size)  # over itself
    loaded = RoutingMemory.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "three", max_shard_size=size)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_provenance_is_left_out_as_a_whole(memory, tmp_path):
    memory.save_pretrained(tmp_path, provenance="none")
    assert read_config(tmp_path)["memory"]["provenance"] is None
    for path in shards(tmp_path):
        with safe_open(path, framework="pt") as shard:
            assert all(re.fullmatch(r"layers\.\d+\.(keys|distances|values\.codes)", key) for key in shard.keys())
    loaded = RoutingMemory.from_pretrained(tmp_path)
    assert loaded.provenance is None and len(loaded) == 40
    assert memory.provenance is not None
    with pytest.raises(ValueError, match="without provenance"):
        loaded.remove_examples([0])


def test_folder_of_another_model_is_refused_and_left_as_it_is(memory, tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="another model"):
        memory.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(FileExistsError, match="another model"):
        memory.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == set(before)


def test_the_user_s_own_files_stay_and_the_old_memory_s_go(memory, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "model.safetensors").write_bytes(b"mine")
    (folder / ".knnmoe-mine").mkdir()
    old = shards(folder)
    smaller = replace(memory.remove_examples([2]), tokenizer=None)
    smaller.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "model.safetensors").read_bytes() == b"mine"
    assert (folder / ".knnmoe-mine").is_dir()
    assert not [path for path in old if path.exists() and path.name != "model.safetensors"]
    assert not (folder / "tokenizer.json").exists()
    assert_same(RoutingMemory.from_pretrained(folder), smaller)


def test_named_chat_templates_can_be_saved_twice(memory, folder):
    memory.tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    memory.save_pretrained(folder)
    memory.save_pretrained(folder)
    assert RoutingMemory.from_pretrained(folder).tokenizer.chat_template["tools"] == "{{ tools }}"


STEPS = {
    "tokenizer": lambda m, p, f: m.setattr(f.tokenizer, "save_pretrained", p, raising=False),
    "card": lambda m, p, f: m.setattr(folder_files, "write_card", p),
    "shard": lambda m, p, f: m.setattr(storage, "save_file", p),
    "digest": lambda m, p, f: m.setattr(storage, "file_digest", p),
    "json": lambda m, p, f: m.setattr(storage, "write_json", p),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_save_that_fails_leaves_the_old_memory_whole(memory, folder, monkeypatch, step):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    before, new = contents(folder), memory.remove_examples([0])
    with monkeypatch.context() as patch:
        STEPS[step](patch, fail, new)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(folder)
    assert contents(folder) == before
    assert_same(RoutingMemory.from_pretrained(folder), memory)


def test_a_failing_rename_at_any_step_leaves_one_whole_memory(memory, folder, tmp_path, monkeypatch):
    new, found, finished = memory.remove_examples([0]), [], False
    new = replace(new, tokenizer=tiny_tokenizer("rain on the gate"))
    new.save_pretrained(tmp_path / "new")
    new = RoutingMemory.from_pretrained(tmp_path / "new")
    for allowed in range(30):
        left = iter(range(allowed))

        def limited(source, target, left=left, move=os.replace):
            if next(left, None) is None:
                raise KeyboardInterrupt
            move(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", limited)
            patch.setattr(os, "rename", limited)
            try:
                new.save_pretrained(folder, max_shard_size=3000)
                finished = True
            except KeyboardInterrupt:
                pass
        loaded = RoutingMemory.from_pretrained(folder)
        found.append(len(loaded) == len(new))
        assert_same(loaded, new if found[-1] else memory)
        assert loaded.tokenizer.get_vocab() == (new if found[-1] else memory).tokenizer.get_vocab()
        if finished:
            break
    assert finished and found == sorted(found) and not found[0] and found.count(True) > 1
    assert len(shards(folder)) == len(read_config(folder)["memory"]["files"])


def _killed_at(name: str, target: str, memory, folder) -> None:
    """Saves in a process that ends without any clean-up just before it moves the file `target` into the folder."""
    move = getattr(os, name)

    def kill(source, destination):
        if os.path.basename(destination) == target and os.path.dirname(destination) == str(folder):
            os._exit(9)
        move(source, destination)

    setattr(os, name, kill)
    memory.save_pretrained(folder, max_shard_size=3000)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked here")
@pytest.mark.parametrize(
    "step", [("rename", ".knnmoe-committed"), ("replace", "config.json")], ids=["before", "after"]
)
def test_a_killed_process_leaves_one_whole_memory_and_the_next_save_cleans_up(memory, folder, step):
    names, smaller = set(contents(folder)), memory.remove_examples([0])
    killed = multiprocessing.get_context("fork").Process(target=_killed_at, args=(*step, smaller, folder))
    killed.start()
    killed.join(timeout=120)
    assert killed.exitcode == 9 and set(contents(folder)) > names
    assert_same(RoutingMemory.from_pretrained(folder), smaller if step[0] == "replace" else memory)
    memory.save_pretrained(folder)
    assert set(contents(folder)) == names


def test_without_provenance_nothing_tells_of_the_examples(memory, tmp_path):
    memory.save_pretrained(tmp_path / "bare", provenance="none")
    about = read_config(tmp_path / "bare")["memory"]
    assert about["provenance"] is None and about["origin"]["reference_set_hash"] is None
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "not named" in card
