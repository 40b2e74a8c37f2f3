"""The tensors of a stranger's memory: headers, numbers, and files that change between the check and the use."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory
from knnmoe_hf.files import file_digest
from knnmoe_hf.memory import shards as shards_of_memories
from tests.memory.helpers import edit_config, full_memory, refused, shards
from tests.memory.hostile.helpers import CONFIG
from tests.memory.test_storage import rewrite
from tests.support.models import random_memory, tiny_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and alarms")


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
def test_numbers_that_no_build_stores_are_refused(tmp_path, name, value):
    full_memory(tiny_model("olmoe"), **ENCODED).save_pretrained(tmp_path / "memory")
    rewrite(tmp_path / "memory", lambda tensors: tensors[f"layers.0.{name}"].fill_(value))
    refused(tmp_path / "memory", f"layers.0.{name}")


@pytest.mark.parametrize(
    "name, value", [("token_ids", -1), ("positions", -2), ("examples", 0), ("offsets", [0, 2**63 - 1, -2, 40, 44])]
)
def test_provenance_that_no_build_stores_is_refused(folder, name, value):
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
