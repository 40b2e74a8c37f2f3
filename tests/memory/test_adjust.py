"""The same rows used otherwise: fewer layers, other options, another threshold; and the history that edits leave."""

import copy
from dataclasses import replace

import pytest
import torch

from knnmoe_hf import RoutingMemory
from knnmoe_hf.errors import MemoryMismatchError
from knnmoe_hf.memory.card import model_card
from knnmoe_hf.memory.sweep import SweepPoint
from tests.memory.card.examples import verdict
from tests.memory.helpers import assert_same, calibration_record, full_memory
from tests.support.attaching import attached
from tests.support.models import tiny_model
from tests.support.stats import with_stats

X = torch.arange(1, 13)[None]


@pytest.fixture(scope="module")
def olmoe():
    return tiny_model("olmoe")


def calibrated(model, **options) -> RoutingMemory:
    """A memory with statistics, a record of their calibration and a verdict."""
    memory = with_stats(full_memory(model, confidence="calibrated", **options))
    measured = verdict(settings={"gamma": memory.config.gamma, "layers": [0, 1]})
    return replace(memory, calibration=calibration_record(), verdict=measured)


def logits(model, memory) -> torch.Tensor:
    with attached(model, memory), torch.no_grad():
        return model(X).logits


def one_sentence(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


# layers


def test_layers_that_are_not_kept_route_as_without_a_memory(olmoe, tmp_path):
    memory = calibrated(olmoe)
    before = copy.deepcopy(memory)
    kept = memory.select_layers([1])
    assert list(kept.layers) == kept.config.layers == [1] and len(kept) == len(memory) and kept.verdict is None
    assert_same(memory, before)
    kept.save_pretrained(tmp_path / "kept")
    memory.save_pretrained(tmp_path / "whole")
    opened = RoutingMemory.from_pretrained(tmp_path / "whole", layers=[1])
    for other in (RoutingMemory.from_pretrained(tmp_path / "kept"), opened):
        assert torch.equal(logits(olmoe, other), logits(olmoe, kept))
    assert "layers [0, 1] -> [1]" in opened.card_data.history[-1]


def test_the_fit_of_next_tokens_goes_with_the_last_layer(olmoe):
    memory = calibrated(olmoe)
    assert memory.select_layers([1, 0]).calibration == memory.calibration
    with_all = memory.calibration
    fit = replace(with_all.fits["both"], gain=None, harm={})
    unknown = replace(with_all, gain=None, harm={}, sweep=[])
    assert memory.select_layers([1]).calibration == replace(unknown, fits={"both": fit})
    assert memory.select_layers((0,)).calibration == replace(unknown, fits={})
    nothing = replace(with_all, threshold=None, gain=None, open_gain=None, fits={})
    assert replace(memory, calibration=nothing).select_layers([0]).calibration == nothing


def test_a_point_of_the_sweep_has_its_expected_gain(olmoe):
    memory = calibrated(olmoe)
    points = [SweepPoint(0.2, 0.35, 0.01), SweepPoint(0.6, 0.3, 0.002)]
    memory = replace(memory, calibration=replace(memory.calibration, sweep=points))
    chosen = memory.with_threshold(0.2).calibration
    assert (chosen.threshold, chosen.gain, chosen.harm, chosen.sweep) == (0.2, 0.35, {}, points)
    assert memory.with_threshold(0.3).calibration.gain is None
    wider = memory.with_threshold(0.2, width=0.3).calibration
    assert (wider.gain, wider.sweep) == (None, [])


@pytest.mark.parametrize("layers", [[], [0, 7], ["0"], [0.5], [-1]])
def test_layers_without_rows_are_refused(olmoe, layers):
    with pytest.raises(ValueError, match="choose one or more of those that have rows") as caught:
        full_memory(olmoe).select_layers(layers)
    assert "[0, 1]" in one_sentence(caught)


# options


def test_other_options_drop_what_was_measured_with_others(olmoe):
    memory = calibrated(olmoe)
    other = memory.with_options(gamma=0.7, confidence="context", search_max_bytes=2**20)
    assert (other.config.gamma, other.config.confidence, other.config.search_max_bytes) == (0.7, "context", 2**20)
    assert other.verdict is None and other.card_data.history == [
        f"options were changed: gamma {memory.config.gamma} -> 0.7, confidence calibrated -> context"
    ]
    same = memory.with_options(gamma=memory.config.gamma, search_max_bytes=2**20)
    assert same.verdict == memory.verdict and same.card_data.history == []


def test_options_of_storage_and_layers_are_refused(olmoe):
    memory = calibrated(olmoe)
    for options, error, word in (
        (dict(key_dtype="int8"), MemoryMismatchError, "recoded"),
        (dict(layers=[0]), MemoryMismatchError, "select_layers"),
        (dict(gamma=-1), ValueError, "gamma=-1 is not allowed"),
        (dict(recall="both"), MemoryMismatchError, None),
    ):
        bare = replace(memory, provenance=None) if "recall" in options else memory
        with pytest.raises(error, match=word) as caught:
            bare.with_options(**options)
        one_sentence(caught)


# the threshold


def test_a_threshold_is_that_of_every_layer(olmoe, tmp_path):
    memory = calibrated(olmoe)
    before = copy.deepcopy(memory)
    wide, shut = memory.with_threshold(-50), memory.with_threshold(50.0, width=0.2)
    assert_same(memory, before)
    assert {(rows.stats.threshold, rows.stats.width) for rows in shut.layers.values()} == {(50.0, 0.2)}
    assert shut.calibration.threshold == 50.0 and shut.verdict is None
    assert shut.calibration.gain is None and shut.calibration.harm == {} and shut.calibration.open_gain == 0.4
    assert shut.card_data.history == ["its confidence was set by hand: threshold 0.5 -> 50, width 0.1 -> 0.2"]
    with torch.no_grad():
        base = olmoe(X).logits
    assert torch.equal(logits(olmoe, shut), base)
    assert torch.allclose(logits(olmoe, wide), logits(olmoe, memory.with_options(confidence="rbf")), atol=1e-5)
    shut.save_pretrained(tmp_path)
    assert_same(RoutingMemory.from_pretrained(tmp_path), shut)


def test_next_tokens_have_a_threshold_of_their_own(olmoe):
    memory = calibrated(olmoe)
    fits = {"both": replace(memory.calibration.fits["both"], routing_threshold=0.9)}
    memory = replace(memory, calibration=replace(memory.calibration, fits=fits))
    fit = memory.with_threshold(next_token_threshold=0.8).calibration.fits["both"]
    assert (fit.threshold, fit.routing_threshold, fit.gain, fit.harm) == (0.8, 0.9, None, {})
    other = memory.with_threshold(next_token_threshold=0.8).calibration
    assert (other.threshold, other.gain, other.harm) == (0.6, 0.3, {"python": 0.002})
    fit = memory.with_threshold(0.1).calibration.fits["both"]
    assert (fit.threshold, fit.routing_threshold, fit.gain) == (0.5, None, None)
    bare = replace(memory, calibration=replace(memory.calibration, fits={}))
    with pytest.raises(ValueError, match="next_token_threshold=0.8 is not possible") as caught:
        bare.with_threshold(next_token_threshold=0.8)
    one_sentence(caught)


@pytest.mark.parametrize(
    "given",
    [dict(threshold=float("nan")), dict(threshold="1"), dict(width=0.0), dict(threshold=True), dict(width=1e10)],
)
def test_a_threshold_that_is_no_number_is_refused(olmoe, given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}=.* is not allowed") as caught:
        calibrated(olmoe).with_threshold(**given)
    one_sentence(caught)


def test_a_memory_without_a_threshold_says_what_to_set_instead(olmoe):
    bare = full_memory(olmoe, confidence="calibrated")
    for memory, way_out in (
        (bare, "knnmoe calibrate"),
        (bare.with_options(confidence="rbf"), "set gamma"),
        (bare.with_options(confidence="context"), "set context_threshold"),
    ):
        with pytest.raises(ValueError, match=way_out) as caught:
            memory.with_threshold(0.4)
        one_sentence(caught)


# the history


def test_every_edit_leaves_a_line_that_is_saved_and_shown(olmoe, tmp_path):
    memory = full_memory(olmoe)
    other = full_memory(olmoe, examples=(7, 8), seed=2).remove_examples([8])
    edited = memory.remove_examples([0, 2]).select_rows(max_rows=12).take(torch.arange(12) < 11)
    edited = edited.merge(other).recoded(olmoe, key_dtype="float16").select_layers([1]).with_options(gamma=0.9)
    assert edited.card_data.history == [
        "2 of 4 examples were removed, with 20 of 40 rows",
        "rows that gained most: 12 of 20 rows were kept",
        "rows that were chosen by hand: 11 of 12 rows were kept",
        "in a memory that was merged into it: 1 of 2 examples were removed, with 10 of 20 rows",
        "two memories were merged: 11 rows and 10 of another memory, which gave 21",
        f"rows were stored anew: key_dtype {memory.config.key_dtype} -> float16",
        "layers [1] of 2 layers were kept",
        f"options were changed: gamma {memory.config.gamma} -> 0.9",
    ]
    assert memory.card_data.history == [] and len(other.card_data.history) == 1
    edited.save_pretrained(tmp_path)
    opened = RoutingMemory.from_pretrained(tmp_path)
    assert opened.card_data == edited.card_data
    card = (tmp_path / "README.md").read_text()
    assert "Since it was built:" in card and "\n8. options were changed: gamma" in card
    assert "Since it was built" not in model_card(memory)
    assert RoutingMemory.from_pretrained(tmp_path, gamma=0.9, search_max_bytes=2**20).card_data == edited.card_data
    assert RoutingMemory.from_pretrained(tmp_path, gamma=0.8).card_data.history[8:] == [
        "options were changed: gamma 0.9 -> 0.8"
    ]


def test_a_configuration_that_is_edited_in_place_is_noted_when_it_is_saved(olmoe, tmp_path):
    memory = calibrated(olmoe)
    old = memory.config.gamma
    memory.config.gamma = 0.9
    memory.save_pretrained(tmp_path)
    assert RoutingMemory.from_pretrained(tmp_path).card_data.history == [f"options were changed: gamma {old} -> 0.9"]
