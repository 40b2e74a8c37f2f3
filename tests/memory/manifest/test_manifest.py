"""The manifest: every value of `config.json` replaced is read or refused in one line."""

import copy
from dataclasses import asdict

import pytest

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.errors import MemoryFileError, MemoryMismatchError
from tests.memory.helpers import (
    assert_same,
    background,
    calibration_record,
    edit_config,
    read_config,
    refused,
    write_config,
)


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


_FREE = {
    "routing_threshold",
    "base_model_class",
    "tokenizer_fingerprint",
    "reference_set_hash",
    "stats",
    "calibration",
    "verdict",
    "task_record",
    "card_data",
    "model_name",
    "license",
    "finetuned_from",
    "measured",
}  # may be null
_TEXT = {"base_model_class", "reference_set_hash", "float32", "bfloat16", "float16"}
_BY_NAME = ("library_versions", "digests")  # texts by any names
_STATED = {"model_name", "license", "finetuned_from"}
_LISTS = {"language", "tags", "dataset_tags", "dataset", "history"}


def _allowed(path, value) -> bool:
    path = ("", *path)
    if value is None:
        return path[-1] in _FREE or path[-1] == "gain" and "calibration" in path  # of a threshold set by hand
    if "calibration" in path[:-1] and path[-1] != "calibration":
        if value == "x":
            return path[-1] == "sha256" or path[-2] == "files"
        lists = value == [] and path[-1] in ("files", "excluded", "sweep")
        return lists or value == {} and path[-1] in ("harm", "fits")
    if path[-2] == "card_data":
        return path[-1] in {"x": _STATED, "[]": _LISTS, "{}": {"build"}}.get(str(value), ())
    if value == "x":
        return path[-1] in (*_TEXT, "README.md") or path[-2] == "library_versions"
    return value == {} and path[-1] in _BY_NAME or value == [] and path[-1] == "tokenizer_files"


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
        if isinstance(parent, list) or any(parent is content["memory"][name] for name in _BY_NAME):
            continue
        del parent[path[-1]]
        write_config(folder, content, original)
        if path[-1] in _FREE - {"stats", "calibration", "card_data", "measured", *_STATED} or {"harm", "fits"} & set(
            path[-2:-1]
        ):
            RoutingMemory.from_pretrained(folder)
        else:
            refused(folder, "config.json")


@pytest.mark.parametrize(
    "change",
    [
        dict(reference_mean=0.28),
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
def test_stats_that_no_calibration_finds_are_refused(folder, change):
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


# calibration records


def test_a_calibration_is_saved_and_read_back(calibrated, folder, tmp_path):
    entry = read_config(folder)["memory"]["calibration"]
    assert entry == asdict(calibration_record())
    loaded = RoutingMemory.from_pretrained(folder)
    assert_same(loaded, calibrated)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()
    assert (tmp_path / "again" / "README.md").read_text() == (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(threshold=float("inf")), "threshold, gain and open_gain"),
        (dict(gain=1), "threshold, gain and open_gain"),
        (dict(open_gain=None), "threshold, gain and open_gain"),
        (dict(threshold=None), "threshold, gain and open_gain"),
        (dict(harm={"python": None}), "harm of a CalibrationRecord"),
        (dict(harm=[]), "harm of a CalibrationRecord"),
        (dict(excluded=("law",)), "excluded of a CalibrationRecord"),
        (dict(background={"python": {}, "law": {}}), "background of a CalibrationRecord"),
        (dict(background={"python": background("hearsay"), "law": background()}), "background of a CalibrationRecord"),
        (dict(background={"python": background(tokens=-1), "law": background()}), "background of a CalibrationRecord"),
        (dict(background={"python": background(files="a.py"), "law": background()}), "background of a CalibrationRec"),
        (dict(background={"python": background()}), r"nothing of the kinds \['law'\]"),
    ],
)
def test_a_record_of_another_form_is_refused_when_it_is_made(given, words):
    with pytest.raises(ValueError, match=words) as caught:
        calibration_record(**given)
    assert "\n" not in str(caught.value)
