"""Broken, edited and foreign files: one line that names the file and the reason, whatever is wrong."""

import copy
import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from knnmoe_hf import RoutingMemory
from knnmoe_hf.errors import MemoryFileError, MemoryMismatchError
from knnmoe_hf.memory.storage import file_digest
from tests.conftest import tiny_model
from tests.memory.helpers import edit_config, full_memory, shards, tiny_tokenizer

KEY = "layers.1.keys"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNNMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def memory():
    return full_memory(tiny_model("olmoe"), tokenizer=tiny_tokenizer())


@pytest.fixture
def folder(memory, tmp_path):
    memory.save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"


def refused(folder, *words, error=MemoryFileError, **options) -> str:
    with pytest.raises(error) as caught:
        RoutingMemory.from_pretrained(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


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
    refused(folder, path.name, "no readable safetensors file")
    path.unlink()
    refused(folder, path.name, "does not exist")


@pytest.mark.parametrize("keep_time", [True, False])
def test_an_edited_byte_is_found_at_the_first_opening(folder, keep_time):
    (path,) = shards(folder)
    flip_last_byte(path, keep_time)
    refused(folder, path.name, "SHA-256")
    refused(folder, path.name, "SHA-256")


def test_a_file_that_passed_is_read_again_only_once_size_or_time_change(folder, cache):
    RoutingMemory.from_pretrained(folder)
    assert len(list(cache.rglob("*.json"))) == 1
    (path,) = shards(folder)
    flip_last_byte(path, keep_time=True)
    RoutingMemory.from_pretrained(folder)
    flip_last_byte(path, keep_time=True)
    flip_last_byte(path, keep_time=False)
    refused(folder, path.name, "SHA-256")


def test_another_cache_directory_or_a_spoilt_note_means_another_look(folder, cache, monkeypatch):
    RoutingMemory.from_pretrained(folder)
    (path,) = shards(folder)
    flip_last_byte(path, keep_time=True)
    (note,) = cache.rglob("*.json")
    for spoilt in ("{broken", "[]", "[" * 100_000, ""):
        note.write_text(spoilt)
        refused(folder, "SHA-256")
    monkeypatch.setenv("KNNMOE_CACHE", str(cache / "other"))
    refused(folder, "SHA-256")


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
        (lambda t: t["layers.0.values"][3, 3].fill_(float("inf")), "not finite"),
        (lambda t: t["provenance.nll_before"][0].fill_(float("nan")), "not finite"),
        (lambda t: t["provenance.offsets"].add_(1), "provenance.offsets"),
        (lambda t: t["provenance.offsets"].copy_(torch.tensor([0, 30, 20, 40, 44])), "provenance.offsets"),
    ],
)
def test_tensors_that_are_not_what_config_says(folder, change, reason):
    rewrite(folder, change)
    refused(folder, str(folder), reason)


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
        refused(name, name, "neither a folder nor a repository", error=FileNotFoundError)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "memory-0123456789abcdef.safetensors/..", "a.bin", ""]
)
def test_a_shard_name_that_leads_elsewhere(folder, name):
    edit_config(folder, lambda config: config["memory"]["files"][0].update(name=name))
    refused(folder, "config.json", "as a shard")


@pytest.mark.parametrize("name", ["../x", "/x", "config.json", "a/../../x"])
def test_a_tokenizer_file_name_that_leads_elsewhere(folder, name):
    edit_config(folder, lambda config: config["memory"]["tokenizer_files"].append(name))
    refused(folder, "config.json", "tokenizer_files")


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    refused(folder, str(folder), "tokenizer")


@pytest.mark.parametrize(
    "name, other", [("value_space", "assignment"), ("value_space", "delta"), ("key_dtype", "float16")]
)
def test_rows_are_not_read_as_what_they_are_not(memory, folder, name, other, tmp_path):
    refused(folder, name, other, error=MemoryMismatchError, **{name: other})
    edited = copy.copy(memory)
    edited.config = copy.deepcopy(memory.config)
    setattr(edited.config, name, other)
    for call in (edited.check_config, lambda: edited.save_pretrained(tmp_path / "new")):
        with pytest.raises(MemoryMismatchError, match=f"{name}.*{other}.*build it anew"):
            call()
    edit_config(folder, lambda config: config.update({name: other}))
    refused(folder, "config.json", name, other, error=MemoryMismatchError)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opened_tensors_are_mapped_from_the_file_not_copied(folder):
    loaded = RoutingMemory.from_pretrained(folder)
    (path,) = shards(folder)
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(path))]
    ranges = [(int(start, 16), int(end, 16)) for start, end in ranges]
    for rows in loaded.layers.values():
        for tensor in (rows.keys, rows.values):
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
