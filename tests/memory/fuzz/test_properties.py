"""What holds for every JSON value, name, file and tensor, found by hypothesis."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as some

from knnmoe_hf.errors import MemoryFileError
from knnmoe_hf.files import file_digest
from knnmoe_hf.lookup.blocks import LARGEST, Bounds, outside
from knnmoe_hf.memory.manifest import Manifest, seal
from knnmoe_hf.memory.plain_files import is_inside, parsed_json, read_json
from knnmoe_hf.memory.shards import open_tensors
from knnmoe_hf.memory.storage import is_shard, write_tensors
from tests.memory.helpers import full_memory, read_config
from tests.support.models import tiny_model

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
NUMBERS = some.integers() | some.floats()
LEAVES = some.none() | some.booleans() | NUMBERS | some.text(max_size=20)
JSON = some.recursive(
    LEAVES, lambda part: some.lists(part, max_size=4) | some.dictionaries(some.text(max_size=5), part, max_size=4)
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SHAPES = some.lists(some.integers(0, 5), min_size=1, max_size=3).map(tuple)
KINDS = some.tuples(SHAPES, some.sampled_from(DTYPES))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNNMOE_CACHE", str(tmp_path / "cache"))


def numbers_in(value) -> list:
    if isinstance(value, dict | list):
        return [
            number for part in (value.values() if isinstance(value, dict) else value) for number in numbers_in(part)
        ]
    return [value] if isinstance(value, int | float) else []


@SETTINGS
@given(JSON)
def test_json_is_read_as_it_is_or_not_at_all(value):
    sound = all(abs(n) < 2**63 if isinstance(n, int) else math.isfinite(n) for n in numbers_in(value))
    data = json.dumps(value).encode()
    if sound:
        assert parsed_json(data) == value
    else:
        with pytest.raises(ValueError):
            parsed_json(data)


@SETTINGS
@given(some.binary(max_size=200) | some.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_an_object_of_json_or_refused_in_one_sentence(data):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "config.json"
        path.write_bytes(data)
        try:
            assert isinstance(read_json(path), dict)
        except MemoryFileError as error:
            assert str(error).isprintable() and str(error).startswith(f"{path} is not usable: ")


@SETTINGS
@given(some.text(max_size=30) | some.lists(some.sampled_from(["..", ".", "a", "", "/", "\\", "~"])).map("/".join))
def test_a_name_that_is_inside_stays_inside(name):
    assume(is_inside(name))
    place = Path("/folder")
    assert place in (place / name).parents and (place / name).relative_to(place).as_posix() == name
    assert ".." not in (place / name).parts


@SETTINGS
@given(some.text(max_size=60))
def test_only_plain_names_are_those_of_shards(name):
    assert not is_shard(name) or name.startswith("memory-") and is_inside(name) and "/" not in name


@SETTINGS
@given(
    some.dictionaries(some.text(min_size=1, max_size=8), some.tuples(SHAPES, some.sampled_from(DTYPES)), max_size=6)
)
def test_what_is_written_is_read_mapped_or_not(kinds):
    assume("__metadata__" not in kinds and all(name.isprintable() for name in kinds))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 100, shape, generator=generator).to(dtype) for name, (shape, dtype) in kinds.items()
    }
    with tempfile.TemporaryDirectory() as place:
        files = write_tensors(Path(place), tensors, 40)
        for mmap in (True, False):
            read = open_tensors(Path(place), files, kinds, mmap=mmap)
            assert set(read) == set(tensors)
            for name, tensor in tensors.items():
                assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


@SETTINGS
@given(some.binary(max_size=300), some.booleans(), some.booleans())
def test_any_bytes_are_no_shard(data, with_length, mmap):
    content = (len(data) // 2).to_bytes(8, "little") + data if with_length else data
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"memory-{'0' * 16}.safetensors"
        path.write_bytes(content)
        files = [{"name": path.name, "bytes": len(content), "sha256": file_digest(path)}]
        with pytest.raises(MemoryFileError, match="is not usable"):
            open_tensors(Path(place), files, {"x": ((3,), torch.float32)}, mmap=mmap)


@SETTINGS
@given(some.data())
def test_every_changed_byte_of_a_shard_is_found(data):
    with tempfile.TemporaryDirectory() as place:
        tensors = {"x": torch.arange(6, dtype=torch.float32), "y": torch.arange(3, dtype=torch.int8)}
        (entry,) = write_tensors(Path(place), tensors, 2**20)
        path = Path(place) / entry["name"]
        content = bytearray(path.read_bytes())
        content[data.draw(some.integers(0, len(content) - 1))] ^= data.draw(some.integers(1, 255))
        path.write_bytes(content)
        kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        with pytest.raises(MemoryFileError):
            open_tensors(Path(place), [entry], kinds, mmap=data.draw(some.booleans()))


@SETTINGS
@given(some.lists(some.floats(width=32), min_size=1, max_size=8), some.floats(-2, 2), some.floats(-2, 2))
def test_numbers_outside_of_bounds_are_found(numbers, low, high):
    wrong = any(not math.isfinite(x) or not low <= x <= high for x in numbers)
    assert (outside(torch.tensor(numbers).double(), Bounds(low, high)) is not None) == wrong
    large = any(not math.isfinite(x) or abs(x) > LARGEST for x in numbers)
    assert (outside(torch.tensor(numbers).double()) is not None) == large


@pytest.fixture(scope="module")
def entry(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("memory") / "memory"
    full_memory(tiny_model("olmoe")).save_pretrained(folder)
    return read_config(folder)["memory"]


@SETTINGS
@given(data=some.data())
def test_any_value_anywhere_in_the_manifest_is_taken_or_refused_in_one_sentence(entry, data):
    content = json.loads(json.dumps(entry))
    place = content
    while isinstance(place, dict | list) and place:
        key = data.draw(some.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or data.draw(some.integers(0, 3)) == 0:
            place[key] = data.draw(JSON)
            break
        place = place[key]
    try:
        content["sha256"] = seal(content)
        assert isinstance(Manifest.from_json(content, Path("config.json")), Manifest)
    except MemoryFileError as error:
        assert str(error).isprintable() and str(error).endswith(".")
