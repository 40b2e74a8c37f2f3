"""Memories of a stranger: nothing is executed, nothing outside of the folder is read, moved or deleted."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory, detach_memory
from knnmoe_hf.errors import MemoryMismatchError
from knnmoe_hf.files import file_digest
from knnmoe_hf.memory import shards as shards_of_memories
from knnmoe_hf.memory.plain_files import LARGEST_JSON
from tests.memory.helpers import edit_config, full_memory, refused, shards, tiny_tokenizer
from tests.memory.test_storage import rewrite
from tests.support.models import random_memory, tiny_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
CONFIG, TOKENIZER, SHARD = "config.json", "tokenizer.json", "a shard"
FILES = [CONFIG, TOKENIZER, "tokenizer_config.json", SHARD]
READ_BY_SOME_TOKENIZERS = ["vocab.txt", "spiece.model", "added_tokens.json", "additional_chat_templates/a.jinja"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNNMOE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_hang():
    def stop(*_):
        pytest.fail("it hangs")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def memory():
    return full_memory(tiny_model("olmoe"), tokenizer=tiny_tokenizer())


@pytest.fixture
def folder(memory, tmp_path):
    memory.save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"


@pytest.fixture
def victim(tmp_path) -> Path:
    """A file beside the memory's folder, which nothing may read, move or delete."""
    path = tmp_path / "victim"
    path.write_text("private")
    yield path
    assert path.read_text() == "private" and not path.is_symlink()


def place(folder: Path, name: str) -> Path:
    return shards(folder)[0] if name == SHARD else folder / name


def edit_tokenizer(folder: Path, **entries) -> None:
    """Changes its configuration, and the digest of that."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    digest_again(folder, path.name)


def digest_again(folder: Path, name: str) -> None:
    edit_config(folder, lambda config: config["memory"]["digests"].update({name: file_digest(folder / name)}))


# files that are none


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_in_place_of_a_file_is_refused(folder, name, relative):
    path = place(folder, name)
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to("../elsewhere" if relative else folder.parent / "elsewhere")
    refused(folder, path.name, "symbolic link")


@pytest.mark.parametrize("name", [*FILES, *READ_BY_SOME_TOKENIZERS])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(folder, name):
    path = place(folder, name)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    refused(folder, path.name, "no regular file")


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_refused(folder, name):
    path = place(folder, name)
    path.unlink()
    path.mkdir()
    refused(folder, path.name)


@pytest.mark.parametrize("name", READ_BY_SOME_TOKENIZERS)
def test_a_link_that_a_tokenizer_may_follow_is_refused(folder, victim, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(victim)
    refused(folder, name, "symbolic link")


def test_a_folder_of_templates_that_is_a_link_is_refused(folder, tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "a.jinja").write_text("x")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    refused(folder, "additional_chat_templates", "symbolic link")


def test_a_device_that_never_ends_is_refused(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/dev/zero")
    refused(folder, CONFIG)


# a snapshot in the cache of huggingface_hub


def as_snapshot(folder: Path, cache: Path, subfolder: str = "") -> Path:
    """The memory as `snapshot_download` leaves it."""
    storage = cache / "models--me--memory"
    snapshot, blobs = storage / "snapshots" / ("0" * 40), storage / "blobs"
    (snapshot / subfolder).mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        link = snapshot / subfolder / path.name
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot / subfolder


@pytest.mark.parametrize("subfolder", ["", "memories", "memories/medicine"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_snapshot_s_links_into_its_blobs_are_followed(folder, tmp_path, subfolder, linked):
    snapshot = as_snapshot(folder, tmp_path / "hub", subfolder)
    if linked:  # a cache on another disk
        (tmp_path / "home").symlink_to(tmp_path / "hub")
        snapshot = tmp_path / "home" / snapshot.relative_to(tmp_path / "hub")
    opened = RoutingMemory.from_pretrained(snapshot)
    assert len(opened) == 40 and opened.tokenizer is not None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("target", ["outside", "another repository", "a link among the blobs", "above the blobs"])
def test_a_snapshot_s_other_links_are_refused(folder, tmp_path, name, target):
    snapshot = as_snapshot(folder, tmp_path / "hub")
    link, storage = place(snapshot, name), tmp_path / "hub" / "models--me--memory"
    targets = {
        "outside": tmp_path / "elsewhere",
        "another repository": tmp_path / "hub" / "models--me--other" / "blobs" / "x",
        "a link among the blobs": storage / "blobs" / "x",
        "above the blobs": storage / "x",
    }
    content = link.read_bytes()
    link.unlink()
    targets[target].parent.mkdir(parents=True, exist_ok=True)
    if target == "a link among the blobs":
        (tmp_path / "elsewhere").write_bytes(content)
        targets[target].symlink_to(tmp_path / "elsewhere")
    else:
        targets[target].write_bytes(content)
    link.symlink_to(os.path.relpath(targets[target], link.parent))
    refused(snapshot, link.name, "symbolic link")


# what an interrupted save leaves, which moves and deletes files when a memory is opened


def leave(folder: Path, gone, files=("README.md",)) -> Path:
    committed = folder / ".knnmoe-committed"
    committed.mkdir()
    for name in files:
        shutil.copy(folder / name, committed / name)
    (committed / ".gone.json").write_text(json.dumps(gone))
    return committed


@pytest.mark.parametrize("gone", [["../victim"], ["x/../../victim"], "absolute", [3], {"a": 1}, 3, None, [["x"]]])
def test_a_leftover_deletes_nothing_outside_of_the_folder(folder, victim, gone):
    leave(folder, [str(victim)] if gone == "absolute" else gone)
    refused(folder, ".knnmoe-committed", "delete it")


def test_a_leftover_deletes_nothing_through_a_linked_folder(folder, victim):
    (folder / "x").symlink_to(victim.parent)
    leave(folder, ["x/victim"])
    refused(folder, ".knnmoe-committed", "symbolic link")


def test_a_leftover_writes_nothing_through_a_linked_folder(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (folder / "x").symlink_to(tmp_path / "other")
    committed = leave(folder, [])
    (committed / "x").mkdir()
    (committed / "x" / "new").write_text("")
    refused(folder, ".knnmoe-committed", "symbolic link")
    assert not list((tmp_path / "other").iterdir())


def test_a_leftover_that_is_a_link_moves_nothing(folder, tmp_path, victim):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ".gone.json").write_text("[]")
    (tmp_path / "work" / "thesis.txt").write_text("")
    (folder / ".knnmoe-committed").symlink_to(tmp_path / "work")
    refused(folder, ".knnmoe-committed")
    assert (tmp_path / "work" / "thesis.txt").exists()


@pytest.mark.parametrize("name", [".gone.json", "README.md"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_leftover_of_other_than_files_is_refused_at_once(folder, victim, name, kind):
    path = leave(folder, []) / name
    path.unlink()
    path.symlink_to(victim) if kind == "link" else os.mkfifo(path)
    refused(folder, ".knnmoe-committed", "neither a file nor a folder")


def test_a_leftover_whose_deletion_was_interrupted_is_no_error(folder):
    (folder / ".knnmoe-committed" / "x").mkdir(parents=True)
    RoutingMemory.from_pretrained(folder)
    assert not (folder / ".knnmoe-committed").exists()


def test_a_later_save_deletes_nothing_that_a_manifest_names_outside(memory, folder, victim):
    digests = {"../victim": file_digest(victim)}
    edit_config(folder, lambda config: config["memory"]["digests"].update(digests))
    refused(folder, CONFIG, "digests")
    memory.save_pretrained(folder, overwrite=True)


# JSON


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


# shards


def test_a_shard_is_named_once(folder):
    edit_config(folder, lambda config: config["memory"]["files"].append(config["memory"]["files"][0]))
    refused(folder, CONFIG, "twice")


def test_a_tensor_that_is_in_two_shards(folder):
    (path,) = shards(folder)
    twin = folder / f"memory-{'0' * 16}.safetensors"
    shutil.copy(path, twin)
    entry = {"name": twin.name, "bytes": twin.stat().st_size, "sha256": file_digest(twin)}
    edit_config(folder, lambda config: config["memory"]["files"].append(entry))
    refused(folder, twin.name, "which is twice")


def with_header(folder: Path, change) -> None:
    """Other bytes of a shard with an edited header, with a config.json that agrees."""
    (path,) = shards(folder)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(change(data[:8], data[8 : 8 + length], data[8 + length :]))
    entry = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    edit_config(folder, lambda config: config["memory"]["files"][0].update(entry))


def header_edited(change):
    def edited(_, header, rest):
        content = json.loads(header)
        change(content)
        text = json.dumps(content).encode()
        return len(text).to_bytes(8, "little") + text + rest

    return edited


KEYS, VALUES = "layers.0.keys", "layers.0.values.codes"


@pytest.mark.parametrize(
    "change",
    [
        lambda length, header, rest: length + header + rest + b"\0",
        lambda length, header, rest: length + header + rest[:-1],
        lambda length, header, rest: (2**63).to_bytes(8, "little") + header + rest,
        lambda length, header, rest: (2**40).to_bytes(8, "little") + header + rest,
        lambda length, header, rest: bytes(8) + header + rest,
        lambda length, header, rest: length,
        lambda length, header, rest: length[:3],
        lambda length, header, rest: length + header.replace(b'"shape"', b'"shape":[1],"shape"', 1) + rest,
        header_edited(lambda content: content[KEYS].update(data_offsets=content[VALUES]["data_offsets"])),
        header_edited(lambda content: content[KEYS].update(data_offsets=[0, 2**62])),
        header_edited(
            lambda content: content[KEYS].update(data_offsets=[x + 4 for x in content[KEYS]["data_offsets"]])
        ),
        header_edited(lambda content: content[KEYS].update(data_offsets=[-4, 4])),
        header_edited(lambda content: content[KEYS].update(shape=[2**62, 2**62])),
        header_edited(lambda content: content[KEYS].update(shape=[-40, -32])),
        header_edited(lambda content: content[KEYS].update(shape=[40.0, 32])),
        header_edited(lambda content: content[KEYS].update(shape=[[40], 32])),
        header_edited(lambda content: content[KEYS].update(dtype=["F32"])),
        header_edited(lambda content: content[KEYS].pop("dtype")),
        header_edited(lambda content: content.update(x="y")),
        header_edited(lambda content: content.update({"x" * 10**5: content.pop(KEYS)})),
    ],
)
@pytest.mark.parametrize("mmap", [True, False])
def test_headers_that_do_not_describe_their_file(folder, change, mmap):
    with_header(folder, change)
    refused(folder, shards(folder)[0].name, mmap=mmap)


def test_a_header_may_not_be_larger_than_its_tensors_need(folder):
    many = {f"x{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(5000)}
    with_header(folder, header_edited(lambda content: content.update(many)))
    refused(folder, shards(folder)[0].name, "it says that its header has")


ENCODED = dict(key_codec="pca", key_dim=16, key_dtype="int8", value_dtype="int8", value_experts=2)


@pytest.mark.parametrize(
    "name, value",
    [
        ("keys", -128),
        ("values.codes", -128),
        ("values.step", -1.0),
        ("values.step", 3e38),
        ("values.offset", -3e38),
        ("encoder.step", -1.0),
        ("encoder.weight", 3e38),
        ("encoder.bias", -3e38),
        ("encoder.mean", 3e38),
        ("distances", -1.0),
        ("values.experts", 3),  # twice in a row
    ],
)
def test_numbers_that_no_build_stores(tmp_path, name, value):
    full_memory(tiny_model("olmoe"), **ENCODED).save_pretrained(tmp_path / "memory")
    rewrite(tmp_path / "memory", lambda tensors: tensors[f"layers.0.{name}"].fill_(value))
    refused(tmp_path / "memory", f"layers.0.{name}")


@pytest.mark.parametrize(
    "name, value", [("token_ids", -1), ("positions", -2), ("examples", 0), ("offsets", [0, 2**63 - 1, -2, 40, 44])]
)
def test_provenance_that_no_build_stores(folder, name, value):
    rewrite(folder, lambda tensors: tensors[f"provenance.{name}"].copy_(torch.tensor(value)))
    refused(folder, str(folder), f"provenance.{name}")


LARGE = {"logits": [9e29, -9e29], "delta": [9e29, -9e29], "assignment": [64.0, -64.0, 0.0, -1e-30]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["olmoe", "minimax_m2"])  # of softmax and of sigmoid scores
@pytest.mark.parametrize("space, value", [(space, value) for space, values in LARGE.items() for value in values])
def test_whatever_is_opened_gives_finite_logits(tmp_path, space, value, family, dtype):
    model = tiny_model(family).eval()
    full_memory(model, value_space=space).save_pretrained(tmp_path / "memory")
    rewrite(tmp_path / "memory", lambda t: [t[name].fill_(value) for name in t if name.endswith("values.codes")])
    attach_memory(model.to(dtype), RoutingMemory.from_pretrained(tmp_path / "memory", gamma=0.0))
    with torch.no_grad():
        assert model(input_ids=torch.arange(1, 9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("options", [dict(gamma=9e18), dict(temperature=1e-320), dict(half_life=1e-320)])
@pytest.mark.parametrize("confidence", ["rbf", "context"])
def test_options_of_any_size_give_finite_logits_at_a_distance_of_nothing(options, confidence):
    model, ids = tiny_model("olmoe").eval(), torch.arange(1, 9)[None]
    memory = random_memory(model, rows=8)
    for rows in memory.layers.values():  # with the smallest unit of distance
        object.__setattr__(rows, "scale", 1e-45)
    for name, value in (options | {"confidence": confidence}).items():
        setattr(memory.config, name, value)
    attach_memory(model, memory)
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("name", ["hnsw_m", "hnsw_ef_construction", "hnsw_ef_search"])
def test_a_graph_may_not_take_many_times_the_room_or_time_of_the_keys(folder, name):
    edit_config(folder, lambda config: config.update({name: 2**40}))
    refused(folder, name)


def test_rows_that_could_not_be_opened_again_are_not_taken():
    model = tiny_model("olmoe")
    keys, values = torch.ones(2, 32), torch.full((2, 8), 3e38)
    config = KNNMoEConfig(key_codec="raw", key_dtype="float32", value_dtype="float32", value_experts=None)
    with pytest.raises(ValueError, match=r"values\[0\] are too large"):
        RoutingMemory.from_rows(config, {0: keys}, {0: values}, model)


# between the check and the use


def test_what_was_checked_is_what_is_used_when_the_name_is_given_to_another_file(folder, monkeypatch):
    (path,) = shards(folder)
    sound = load_file(path)[KEYS]
    check = shards_of_memories._check_entry

    def check_and_replace(shard, *args):
        other = path.with_suffix(".other")
        other.write_bytes(path.read_bytes()[:-10_000] + bytes(10_000))  # the keys are in these bytes
        os.replace(other, path)
        return check(shard, *args)

    monkeypatch.setattr(shards_of_memories, "_check_entry", check_and_replace)
    assert torch.equal(RoutingMemory.from_pretrained(folder).layers[0].key_codes, sound)


USE = """
import sys, torch
from knnmoe_hf import RoutingMemory
memory = RoutingMemory.from_pretrained(sys.argv[1], mmap=sys.argv[2] == "map")
import os
(path,) = [name for name in os.listdir(sys.argv[1]) if name.endswith(".safetensors")]
os.truncate(os.path.join(sys.argv[1], path), 0)
print(all(bool(rows.key_codes.isfinite().all()) for rows in memory.layers.values()))
"""


def test_a_memory_in_ram_survives_that_its_file_is_truncated_while_it_is_in_use(folder):
    run = subprocess.run([sys.executable, "-c", USE, str(folder), "read"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "True", run.stderr


def test_a_memory_in_ram_equals_the_mapped_one(memory, folder):
    mapped, read = (RoutingMemory.from_pretrained(folder, mmap=mmap) for mmap in (True, False))
    for layer, rows in mapped.layers.items():
        for name, tensor in rows.tensors().items():
            assert torch.equal(tensor, read.layers[layer].tensors()[name])


def test_a_file_in_ram_is_checked_each_time(folder):
    RoutingMemory.from_pretrained(folder, mmap=False)
    (path,) = shards(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(folder, path.name, "SHA-256", mmap=False)


# the tokenizer


@pytest.mark.parametrize(
    "entries",
    [
        {"vocab_file": "/etc/passwd"},
        {"tokenizer_file": "/etc/passwd"},
        {"gguf_file": "/etc/passwd"},
        {"special_tokens_map_file": "/home/somebody/.cache/x"},
    ],
    ids=str,
)
def test_files_that_a_tokenizer_names_are_not_read(folder, entries):
    edit_tokenizer(folder, **entries)
    opened = RoutingMemory.from_pretrained(folder)
    assert opened.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize(
    "entries",
    [
        {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]},
        {"fast_tokenizer_files": "x"},
        {"mecab_kwargs": {"mecab_dic": "/etc/passwd"}},
        {"anything": ["x", {"y": "../../z"}]},
    ],
    ids=str,
)
def test_paths_that_lead_out_of_the_folder_are_refused(folder, entries):
    edit_tokenizer(folder, **entries)
    refused(folder, "tokenizer_config.json", next(iter(entries)))


def test_a_chat_template_cannot_reach_python(folder):
    edit_tokenizer(folder, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    tokenizer = RoutingMemory.from_pretrained(folder).tokenizer
    with pytest.raises(Exception, match="unsafe|undefined"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_a_file_of_a_tokenizer_has_a_largest_size_and_a_user_s_own_beside_it_has_none(folder):
    for name in ("vocab.txt", "table.parquet"):
        (folder / name).write_bytes(b"")
        os.truncate(folder / name, 2**40)  # takes no room on the disk
    refused(folder, "vocab.txt", "bytes")
    (folder / "vocab.txt").unlink()
    assert RoutingMemory.from_pretrained(folder).tokenizer is not None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_the_tokenizer_that_is_missing_or_changed_is_named(folder, name):
    (folder / name).write_text((folder / name).read_text() + " ")
    refused(folder, name, "not the file that was saved")
    (folder / name).unlink()
    refused(folder, name, "does not exist")


def test_a_tokenizer_that_makes_rust_panic_or_is_no_tokenizer_is_refused(folder):
    for content in ({}, {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}}, {"model": 3}, []):
        (folder / "tokenizer.json").write_text(json.dumps(content))
        digest_again(folder, "tokenizer.json")
        refused(folder, str(folder), "tokenizer")


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


def test_nobody_is_told_to_trust_the_code_of_a_tokenizer(folder, memory):
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.Own", None]},
    }
    path.write_text(json.dumps(content))
    (folder / "own.py").write_text("raise SystemExit(3)")
    edit_config(folder, lambda found: found["memory"]["digests"].update({path.name: file_digest(path)}))
    assert "trust_remote_code" not in refused(folder, "code of its own, which is never run")
