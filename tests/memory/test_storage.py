"""Broken, edited and foreign files: one line that names the file and the reason, whatever is wrong."""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from knnmoe_hf import RoutingMemory, attach_memory, detach_memory
from knnmoe_hf.errors import MemoryFileError, MemoryMismatchError
from knnmoe_hf.files import file_digest
from knnmoe_hf.lookup.options import FIXED_AT_BUILD
from knnmoe_hf.memory import shards as shards_of_memories
from tests.memory.helpers import edit_config, full_memory, refused, shards, tiny_tokenizer
from tests.support.models import tiny_model

KEY = "layers.1.keys"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNNMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rewrite(folder, change) -> None:
    """Other tensors in the shard, with a config.json that agrees in size and digest."""
    (path,) = shards(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    entry = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    edit_config(folder, lambda config: config["memory"]["files"][0].update(entry))


def flip_last_byte(path, keep_time: bool) -> None:
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns if keep_time else stat.st_mtime_ns + 1))


def test_missing_and_truncated_shards(folder):
    (path,) = shards(folder)
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    refused(folder, path.name, f"{len(data) - 7} bytes where config.json says {len(data)}")
    edit_config(folder, lambda config: config["memory"]["files"][0].update(bytes=len(data) - 7))
    refused(folder, path.name, "not a readable safetensors file")
    path.unlink()
    refused(folder, path.name, "does not exist")


@pytest.mark.parametrize("keep_time", [True, False])
def test_an_edited_byte_is_found_at_the_first_opening(folder, keep_time):
    (path,) = shards(folder)
    flip_last_byte(path, keep_time)
    refused(folder, path.name, "SHA-256")
    refused(folder, path.name, "SHA-256")


@pytest.fixture
def digested(monkeypatch) -> list:
    """Paths of files that were read as a whole, and found to be as they were saved."""
    paths, check = [], shards_of_memories._check_digest
    monkeypatch.setattr(
        shards_of_memories, "_check_digest", lambda shard, found: paths.append(shard.path) or check(shard, found)
    )
    return paths


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_file_that_passed_is_read_again_only_once_it_was_changed(folder, cache, digested, keep_time):
    for _ in range(2):
        RoutingMemory.from_pretrained(folder)
    assert len(list(cache.rglob("*.json"))) == 1
    (path,) = shards(folder)
    assert digested == [path]
    flip_last_byte(path, keep_time)
    refused(folder, path.name, "SHA-256")


def test_another_cache_directory_or_a_spoilt_note_means_another_check(folder, cache, digested, monkeypatch):
    RoutingMemory.from_pretrained(folder)
    (note,) = cache.rglob("*.json")
    for looks, spoilt in enumerate(("{broken", "[]", "[" * 100_000, ""), 2):
        note.write_text(spoilt)
        RoutingMemory.from_pretrained(folder)
        assert len(digested) == looks
    monkeypatch.setenv("KNNMOE_CACHE", str(cache / "other"))
    RoutingMemory.from_pretrained(folder)
    assert len(digested) == looks + 1


def test_a_cache_that_cannot_be_written_is_no_error(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KNNMOE_CACHE", str(tmp_path / "file"))
    assert len(RoutingMemory.from_pretrained(folder)) == 40


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: t.update({KEY: t[KEY][:-1].clone()}), "[39, 32] torch.float32 where config.json says [40, 32]"),
        (lambda t: t.update({KEY: t[KEY].T.contiguous()}), "[32, 40]"),
        (lambda t: t.update({KEY: t[KEY].half()}), "torch.float16"),
        (lambda t: t.update({KEY: t[KEY].double()}), "F64"),
        (lambda t: t.update({KEY: torch.zeros(40, 32, dtype=torch.bool)}), "BOOL"),
        (lambda t: t.pop(KEY), "no shard holds"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra'"),
        (lambda t: t[KEY].view(-1)[7].fill_(float("nan")), "not finite"),
        (lambda t: t["layers.0.values.codes"][3, 3].fill_(float("inf")), "not finite"),
        (lambda t: t["provenance.nll_before"][0].fill_(float("nan")), "not finite"),
        (lambda t: t["provenance.offsets"].add_(1), "provenance.offsets"),
        (lambda t: t["provenance.offsets"].copy_(torch.tensor([0, 30, 20, 40, 44])), "provenance.offsets"),
    ],
)
def test_tensors_that_are_not_what_config_says(folder, change, reason):
    rewrite(folder, change)
    refused(folder, str(folder), reason)


ENCODED = dict(key_codec="pca", key_dim=16, key_dtype="int8", value_dtype="int8", value_experts=2)
SPOILT = [
    (
        lambda t: t["layers.1.values.experts"][7, 1].fill_(8),
        "layers.1.values.experts has indices that are not from 0",
    ),
    (
        lambda t: t["layers.0.values.experts"][0, 0].fill_(255),
        "layers.0.values.experts has indices that are not from 0",
    ),
    (lambda t: put(t, "values.experts", torch.zeros(40, 2, dtype=torch.int16)), "torch.int16 where"),
    (lambda t: put(t, "values.experts", torch.zeros(40, 2, dtype=torch.int8)), "torch.int8 where"),
    (lambda t: put(t, "values.experts", torch.zeros(40, 4, dtype=torch.uint8)), "[40, 4]"),
    (lambda t: put(t, "values.codes", torch.zeros(40, 8, dtype=torch.int8)), "[40, 8]"),
    (lambda t: put(t, "values.codes", torch.zeros(40, 2, dtype=torch.uint8)), "torch.uint8 where"),
    (lambda t: put(t, "values.rest", torch.zeros(40)), "torch.float32 where"),
    (lambda t: put(t, "values.rest", torch.zeros(40, 1, dtype=torch.float16)), "[40, 1]"),
    (lambda t: t["layers.1.values.rest"][0].fill_(float("-inf")), "not finite"),
    (lambda t: put(t, "values.step", torch.zeros(8)), "[8]"),
    (lambda t: t["layers.1.values.step"].fill_(float("nan")), "not finite"),
    (lambda t: t["layers.1.values.offset"].fill_(float("inf")), "not finite"),
    (lambda t: t.pop("layers.1.values.offset"), "no shard holds the tensor layers.1.values.offset"),
    (lambda t: put(t, "keys", torch.zeros(40, 32, dtype=torch.int8)), "[40, 32]"),
    (lambda t: put(t, "keys", torch.zeros(40, 16)), "torch.float32 where"),
    (lambda t: put(t, "encoder.weight", torch.zeros(32, 16)), "[32, 16]"),
    (lambda t: put(t, "encoder.weight", torch.zeros(16, 31)), "[16, 31]"),
    (lambda t: put(t, "encoder.weight", torch.zeros(16, 32).half()), "torch.float16 where"),
    (lambda t: t["layers.1.encoder.weight"][0, 0].fill_(float("nan")), "not finite"),
    (lambda t: put(t, "encoder.bias", torch.zeros(1)), "[1]"),
    (lambda t: t["layers.1.encoder.bias"][0].fill_(float("inf")), "not finite"),
    (lambda t: put(t, "encoder.step", torch.zeros(())), "[] torch.float32"),
    (lambda t: t["layers.1.encoder.step"][0].fill_(float("inf")), "not finite"),
    (lambda t: t.pop("layers.1.encoder.step"), "no shard holds the tensor layers.1.encoder.step"),
    (lambda t: put(t, "encoder.of_logits", torch.ones(1)), "'layers.1.encoder.of_logits'"),
    (lambda t: put(t, "distances", torch.zeros(40, 5)), "[40, 5]"),
    (lambda t: t["layers.1.distances"][0, 0].fill_(float("inf")), "not finite"),
]


def put(tensors, name, tensor) -> None:
    tensors[f"layers.1.{name}"] = tensor


@pytest.fixture(scope="module")
def encoded():
    return full_memory(tiny_model("olmoe"), **ENCODED)


@pytest.mark.parametrize("change, reason", SPOILT)
def test_encoded_tensors_that_are_not_what_config_says(encoded, tmp_path, change, reason):
    encoded.save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    refused(tmp_path, str(tmp_path), reason)


@pytest.mark.parametrize("expert", [-1, -(2**15), 300, 2**15 - 1])
def test_experts_that_a_large_model_does_not_have(tmp_path, expert):
    model = tiny_model("olmoe", num_experts=300)
    full_memory(model, **ENCODED).save_pretrained(tmp_path)
    assert RoutingMemory.from_pretrained(tmp_path).layers[1].values.experts.dtype == torch.int16
    rewrite(tmp_path, lambda t: t["layers.1.values.experts"][3, 1].fill_(expert))
    refused(tmp_path, str(tmp_path), "layers.1.values.experts has indices that are not from 0 to 299")


def test_experts_are_checked_again_once_config_says_that_there_are_fewer(encoded, tmp_path):
    encoded.save_pretrained(tmp_path)
    RoutingMemory.from_pretrained(tmp_path)  # the file is known to be sound now, for eight experts
    edit_config(tmp_path, lambda config: config["memory"]["layers"][1].update(num_experts=7))
    refused(tmp_path, str(tmp_path), "layers.1.values.experts has indices that are not from 0 to 6")


def test_shapes_are_checked_before_contents_are_read(folder):
    rewrite(folder, lambda t: t.update({KEY: t[KEY].half()}))
    flip_last_byte(shards(folder)[0], keep_time=False)
    assert "SHA-256" not in refused(folder, KEY, "torch.float16")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "[" * 100_000, "\x00", '{"model_type": 3}'])
def test_a_config_that_is_no_memory_s(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_a_config_that_is_not_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refused(folder, "config.json", "cannot be read as JSON")


def test_the_folder_of_a_model(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path)
    refused(tmp_path, "config.json", "'olmoe'")


def test_a_folder_without_config_and_no_folder_at_all(tmp_path):
    refused(tmp_path, str(tmp_path), "no config.json")
    for name in (tmp_path / "none", "./none", "a/b/c"):
        refused(name, str(name), error=FileNotFoundError)
    for name in ("nobody/knows-this", "not-here", "wrong name!"):
        refused(name, name, error=FileNotFoundError)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "memory-0123456789abcdef.safetensors/..", "a.bin", ""]
)
def test_a_shard_name_that_leads_elsewhere(folder, name):
    edit_config(folder, lambda config: config["memory"]["files"][0].update(name=name))
    refused(folder, "config.json", "as a shard")


@pytest.mark.parametrize("name", ["../x", "/x", "config.json", "a/../../x", "C:x", "é" * 130, "x/" * 600 + "x"])
def test_a_tokenizer_file_name_that_leads_elsewhere(folder, name):
    edit_config(folder, lambda config: config["memory"]["tokenizer_files"].append(name))
    refused(folder, "config.json", "tokenizer_files")


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    refused(folder, str(folder), "tokenizer")


@pytest.mark.parametrize(
    "name, other",
    [
        ("value_space", "assignment"),
        ("value_space", "delta"),
        ("key_codec", "pca"),
        ("key_codec", "logits"),
        ("key_dim", 8),
        ("key_whitening", 1.0),
        ("key_dtype", "float16"),
        ("key_dtype", "int8"),
        ("value_dtype", "int8"),
        ("value_experts", 3),
    ],
)
def test_rows_are_not_read_as_what_they_are_not(memory, folder, name, other, tmp_path):
    refused(folder, name, str(other), error=MemoryMismatchError, **{name: other})
    edited = replace(memory)
    setattr(edited.config, name, other)
    model = tiny_model("olmoe")
    for call in (
        edited.check_config,
        lambda: edited.save_pretrained(tmp_path / "new"),
        lambda: attach_memory(model, edited),
    ):
        with pytest.raises(MemoryMismatchError, match=f"{name}.*{other}.*build it anew") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no memory is attached"):
        detach_memory(model)
    edit_config(folder, lambda config: config.update({name: other}))
    refused(folder, "config.json", name, str(other), error=MemoryMismatchError)


def test_that_every_option_of_storage_is_fixed_is_seen_above():
    marks = test_rows_are_not_read_as_what_they_are_not.pytestmark
    assert {name for name, _ in marks[0].args[1]} == set(FIXED_AT_BUILD)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opened_tensors_are_mapped_from_the_file_not_copied(folder):
    loaded = RoutingMemory.from_pretrained(folder)
    (path,) = shards(folder)
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(path))]
    ranges = [(int(start, 16), int(end, 16)) for start, end in ranges]
    for rows in loaded.layers.values():
        for tensor in rows.tensors().values():
            assert any(start <= tensor.data_ptr() < end for start, end in ranges)


def test_a_tokenizer_that_is_not_the_memory_s_is_not_taken(tmp_path):
    full_memory(tiny_model("olmoe")).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert RoutingMemory.from_pretrained(tmp_path).tokenizer is None


@pytest.mark.parametrize("entry", ["versions", "scale"])
def test_an_edited_entry_is_found_by_its_seal(folder, entry):
    def change(content):
        if entry == "versions":
            content["memory"]["library_versions"]["torch"] = "0.1"
        else:
            content["memory"]["layers"][0]["scale"] *= 100

    edit_config(folder, change, sealed=False)
    refused(folder, "config.json", "it was edited")


def test_an_edited_tokenizer_is_found(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["gate"], vocabulary["expert"] = vocabulary["expert"], vocabulary["gate"]
    path.write_text(json.dumps(content))
    refused(folder, "tokenizer.json", "not the file that was saved")
    edit_config(folder, lambda config: config["memory"]["digests"].update({path.name: file_digest(path)}))
    refused(folder, "tokenizer.json", "not the tokenizer")


def test_code_that_comes_with_a_tokenizer_is_never_run(folder, tmp_path):
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    try:
        RoutingMemory.from_pretrained(folder)
    except MemoryFileError:
        pass
    assert not (tmp_path / "ran").exists()
