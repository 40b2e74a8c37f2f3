"""Every value of `config.json` replaced by another: read as it should be, or refused in one line."""

import copy

import pytest

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.errors import MemoryFileError, MemoryMismatchError
from tests.conftest import tiny_model
from tests.memory.helpers import edit_config, full_memory, read_config, tiny_tokenizer, write_config
from tests.memory.test_loading import refused
from tests.support.stats import with_stats


@pytest.fixture
def folder(tmp_path):
    encoding = dict(key_codec="pca", key_dim=8, key_dtype="int8", value_dtype="int8", value_experts=2)
    memory = full_memory(tiny_model("olmoe"), tokenizer=tiny_tokenizer(), confidence="calibrated", **encoding)
    memory = with_stats(
        memory, reference_mean=0.6, background_mean=0.3, weight=2.0, reference_drift=0.1, open_shift=-0.2
    )
    memory.save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"


def _places(value, path=()):
    """Every place in a JSON value, containers included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _put(content, path, value):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


_FREE = {"base_model_class", "tokenizer_fingerprint", "reference_set_hash", "stats"}  # may be null
_TEXT = {"base_model_class", "reference_set_hash", "float32", "bfloat16", "float16"}


def _allowed(path, value) -> bool:
    path = ("", *path)
    if value is None:
        return path[-1] in _FREE
    if value == "x":
        return path[-1] in _TEXT or "library_versions" in path[:-1] or path[-2] == "tokenizer_files"
    if value in ([], {}) and path[-1] in ("projections", "norms", "tokenizer_files", "library_versions"):
        return type(value) is (dict if path[-1] == "library_versions" else list)
    return value == [] and path[-2] in ("projections", "norms")


@pytest.mark.parametrize("value", [None, -1, "x", [], {}, True, float("nan"), 2**70], ids=str)
def test_any_value_of_the_memory_entry_replaced_is_refused_in_one_line(folder, value):
    original = read_config(folder)
    places = list(_places(original["memory"], ("memory",)))
    assert len(places) > 50
    for path in places:
        content = copy.deepcopy(original)
        _put(content, path, value)
        write_config(folder, content, original)
        if _allowed(path, value):
            RoutingMemory.from_pretrained(folder)
            continue
        try:
            RoutingMemory.from_pretrained(folder)
        except (MemoryFileError, MemoryMismatchError) as error:
            assert "\n" not in str(error) and str(folder) in str(error), path
        else:
            pytest.fail(f"{value!r} was taken at {path}")


def test_any_key_of_config_left_out_of_the_memory_entry_is_refused(folder):
    original = read_config(folder)
    for path in _places(original["memory"], ("memory",)):
        content = parent = copy.deepcopy(original)
        for key in path[:-1]:
            parent = parent[key]
        if isinstance(parent, list) or parent is content["memory"]["library_versions"]:
            continue
        del parent[path[-1]]
        write_config(folder, content, original)
        if path[-1] in _FREE - {"stats"}:
            RoutingMemory.from_pretrained(folder)
        else:
            refused(folder, "config.json")


@pytest.mark.parametrize(
    "change",
    [
        dict(reference_mean=0.3),
        dict(reference_mean=0.2),
        dict(reference_mean=float("inf")),
        dict(background_mean=float("-inf")),
        dict(weight=0.0),
        dict(weight=-1.0),
        dict(width=0.0),
        dict(reference_drift=-0.4),
        dict(min_warmup=-0.1),
        dict(min_warmup=1.0),
        dict(scale=0.0),
        dict(gamma=-0.1),
        dict(half_life=0.0),
        dict(num_neighbors=0.0),
        dict(width=-0.1),
        dict(threshold=float("nan")),
        dict(more=1.0),
    ],
    ids=str,
)
def test_levels_that_no_calibration_finds_are_refused(folder, change):
    edit_config(folder, lambda config: config["memory"]["layers"][1]["stats"].update(change))
    refused(folder, "config.json")


@pytest.mark.parametrize("sample", [[41, 4], [40], [40, 4, 1], [-1, 4], [0, 4], [40.0, 4], "ab", [[40], [4]]], ids=str)
def test_a_sample_of_another_size_is_refused(folder, sample):
    edit_config(folder, lambda config: config["memory"]["layers"][1].update(sample=sample))
    refused(folder, str(folder))


@pytest.mark.parametrize("value", [None, -1, "x", [], {}], ids=str)
@pytest.mark.parametrize("name", [*KNNMoEConfig().saved(), "dtype", "id2label", "unknown"])
def test_any_other_value_of_config_replaced_is_read_or_refused_in_one_line(folder, name, value):
    edit_config(folder, lambda config: config.update({name: value}))
    try:
        RoutingMemory.from_pretrained(folder)
    except (MemoryFileError, MemoryMismatchError) as error:
        assert "\n" not in str(error) and "config.json" in str(error)
