"""Calibration of tiny models: what it reports is measured again by forward passes of the model."""

import copy
import logging
import subprocess
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch

from knnmoe_hf import RoutingMemory, active_memory, attach_memory, calibrate, detach_memory, disable_memory, get_memory
from knnmoe_hf.calibration import calibrate as module
from knnmoe_hf.calibration.background import KINDS, BackgroundText
from knnmoe_hf.calibration.calibrate import MEAN_HARM, WORST_HARM
from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.calibration.observe import Observation
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.evaluation.scores import score
from knnmoe_hf.lookup.confidence import CalibrationStats
from knnmoe_hf.models import logits_probe
from knnmoe_hf.models.attach import watch_lookups
from knnmoe_hf.models.hooks import RoutingHooks
from knnmoe_hf.models.probe import probe_model
from tests.conftest import FAMILIES, random_memory, tiny_model
from tests.memory.helpers import assert_same
from tests.support.attaching import attached
from tests.support.domain import domain, domain_memory, own_text
from tests.support.stats import stats_of, with_stats
from tests.support.tokenizers import MARKED, byte_tokenizer
from tests.support.training import trainer_for


def nll(model, rows) -> float:
    return score(model, rows, 8).mean_nll


def harm(model, memory, rows) -> float:
    before = nll(model, rows)
    with attached(model, memory):
        return nll(model, rows) - before


def at(memory, threshold: float) -> RoutingMemory:
    """The memory with another threshold in its stats."""
    layers = {i: replace(rows, stats=replace(rows.stats, threshold=threshold)) for i, rows in memory.layers.items()}
    return replace(memory, layers=layers)


class Case:
    """A model, a memory of the domain, background text sampled from the model, and the calibrated memory."""

    def __init__(self, family: str):
        self.model, self.memory = tiny_model(family), domain_memory(family, "calibrated")
        self.background = {"one": own_text(self.model, 24, 1), "two": own_text(self.model, 24, 2, temperature=0.8)}
        self.given = self.background | {"more of the domain": domain(16, 77)}
        self.fitted, self.found = calibrate(self.model, self.memory, self.given)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def olmoe() -> Case:
    return Case("olmoe")


# results


def test_harm_on_background_text_is_within_bounds_and_the_domain_still_gains(case):
    opened, other = at(case.fitted, -1e3), domain(16, 78)
    found = [harm(case.model, case.fitted, rows) for rows in case.background.values()]
    assert max(found) <= WORST_HARM + 1e-6 and sum(found) <= 2 * MEAN_HARM + 1e-6
    assert all(harm(case.model, opened, rows) > 0.2 for rows in case.background.values())
    gain = -harm(case.model, case.fitted, other)
    assert gain > 0.3 and gain > -0.7 * harm(case.model, opened, other)


def test_a_lower_threshold_would_break_a_bound(case):
    lower = at(case.fitted, 0.3)
    found = [harm(case.model, lower, rows) for rows in case.background.values()]
    assert max(found) > WORST_HARM or sum(found) > 2 * MEAN_HARM
    assert case.found.threshold > 0.3


def test_the_reported_harm_and_threshold_are_those_of_the_memory(case):
    assert set(case.found.harm) == set(case.background) and case.found.excluded == ["more of the domain"]
    for kind, cost in case.found.harm.items():
        assert cost == pytest.approx(harm(case.model, case.fitted, case.background[kind]), abs=1e-5)
    assert {rows.stats.threshold for rows in case.fitted.layers.values()} == {case.found.threshold}


HALF_LIFE = 4.0
KEEP = 0.5 ** (1 / HALF_LIFE)


def similarities(model, memory, rows, threshold: float = 1e3) -> dict[int, list[tuple]]:
    """`{layer: [(warmup, similarity, running mean)]}` of each target; the default threshold closes the memory."""
    config = memory.config
    shut = with_stats(memory, threshold=threshold)
    seen, found = {}, {layer: [] for layer in memory.layers}
    with (
        attached(model, shut),
        watch_lookups(model, lambda event: seen.update({event.layer: event.neighbors.distances})),
    ):
        for one in rows:
            with torch.no_grad():
                model(input_ids=torch.tensor([one["input_ids"]]))
            for layer, distances in seen.items():
                similar = (-config.gamma * distances / memory.layers[layer].scale).exp().mean(-1).tolist()
                total = weight = 0.0
                for t, value in enumerate(similar[:-1]):
                    total, weight = total * KEEP + value, weight * KEEP + 1
                    if one["labels"][t + 1] != -100:
                        found[layer].append((KEEP ** (t + 1), value, total / weight))
    return found


def line(points: list[tuple]) -> tuple[float, float]:
    """A line fitted to the running means: its value at warmup 0 (late in a sequence) and its slope."""
    slope, mean = np.polyfit([one[0] for one in points], [one[2] for one in points], 1)
    return mean, slope


def average(points: list[tuple], column: int) -> float:
    return sum(one[column] for one in points) / len(points)


def test_the_sweep_goes_from_open_to_closed_through_the_fitted_point(case):
    points = case.found.sweep
    thresholds = [point.threshold for point in points]
    assert thresholds == sorted(set(thresholds)) and len(points) > 30
    (fitted,) = [point for point in points if point.threshold == case.found.threshold]
    assert fitted.gain == pytest.approx(case.found.gain, abs=1e-9)
    assert points[0].gain == pytest.approx(case.found.open_gain, rel=0.05) and points[0].harm > fitted.harm
    assert points[-1].gain == pytest.approx(0, abs=1e-6) and points[-1].harm == pytest.approx(0, abs=1e-6)


def test_stats_are_those_of_held_out_references_and_of_background_text(case):
    held = hold_out(case.memory)
    others = case.memory.take(held.rest)
    own, opened = (similarities(case.model, others, held.rows, threshold) for threshold in (1e3, -1e3))
    seen = similarities(case.model, case.memory, held.rows)
    background, wide_open = (
        [similarities(case.model, case.memory, rows, threshold) for rows in case.background.values()]
        for threshold in (1e3, -1e3)
    )
    for layer, rows in case.fitted.layers.items():
        stats = rows.stats
        assert (stats.reference_mean, stats.reference_drift) == pytest.approx(line(own[layer]), abs=0.004)
        nearest = max((kind[layer] for kind in background), key=lambda points: average(points, 2))
        assert (stats.background_mean, stats.background_drift) == pytest.approx(line(nearest), abs=0.004)
        assert stats.open_shift == pytest.approx(average(own[layer], 1) - average(opened[layer], 1), abs=0.004)
        kind = next(i for i, found in enumerate(background) if found[layer] is nearest)
        shift = average(nearest, 1) - average(wide_open[kind][layer], 1)
        assert stats.background_open_shift == pytest.approx(shift, abs=0.004)
        assert stats.reference_mean > stats.background_mean + 0.01 and stats.weight > 0 and stats.width > 0
        assert stats.scale == rows.scale and stats.differs(case.memory.config) is None
        assert average(seen[layer], 1) > average(own[layer], 1) + 0.01  # text whose rows it has is more similar to it
    assert case.fitted.layers[0].stats != case.fitted.layers[1].stats
    assert case.fitted.layers[0].stats.open_shift == 0.0 != case.fitted.layers[1].stats.open_shift


def test_stats_of_late_targets_assume_no_drift_at_the_beginning_of_a_sequence(olmoe):
    """As in completions of long prompts; a wrong drift would open or close the memory wherever a text begins."""
    late = [one | {"labels": [-100] * 20 + one["labels"][20:]} for one in olmoe.background["one"]]
    fitted, _ = calibrate(olmoe.model, olmoe.memory, {"late": late})
    for layer, rows in fitted.layers.items():
        assert abs(rows.stats.background_drift) < 0.02, rows.stats
        assert rows.stats.background_mean == pytest.approx(olmoe.fitted.layers[layer].stats.background_mean, abs=0.1)


def test_stats_of_short_rows_are_not_extrapolated_to_long_text(olmoe):
    memory = domain_memory("olmoe", "calibrated")
    memory.config.half_life = 24.0
    short = own_text(olmoe.model, 96, 1)
    short = [one | {name: one[name][:6] for name in ("input_ids", "labels", "attention_mask")} for one in short]
    fitted, _ = calibrate(olmoe.model, memory, {"short": short})
    for rows in fitted.layers.values():
        assert rows.stats.min_warmup == pytest.approx(0.5 ** (5 / 24), abs=1e-6)
    assert harm(olmoe.model, fitted, own_text(olmoe.model, 24, 2)) < WORST_HARM + 0.003


def test_a_memory_that_lost_rows_does_no_more_harm(case):
    """Neighbours are then further away, but the stats keep the distance scale with which they were fitted."""
    for kept in (24, 8):
        fewer = case.fitted.remove_examples(range(kept, 48))
        assert fewer.layers[0].scale > 1.02 * case.fitted.layers[0].scale
        for rows in case.background.values():
            assert harm(case.model, fewer, rows) < WORST_HARM + 0.003
    assert harm(case.model, case.fitted.remove_examples([0]), domain(16, 78)) < -0.2


def test_rows_of_text_are_read_with_the_memorys_tokenizer(bytewise, tmp_path):
    trainer = build(bytewise, tmp_path, None, byte_tokenizer())
    rows = [{"text": "the gate routes a token" + "!" * n} for n in range(4)]
    fitted, found = calibrate(bytewise, trainer.memory, {"text": rows})
    wanted = calibrate(bytewise, trainer.memory, {"text": prepare_dataset(rows, byte_tokenizer(), None)})
    assert found == wanted[1]
    assert_same(fitted, wanted[0])


def test_a_build_whose_calibration_fails_still_has_its_memory(bytewise, tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("knnmoe_hf.training.refine.calibrate_prepared", fails)
    references = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in domain(8, 0)]
    trainer = trainer_for(bytewise, tmp_path, references, dict(num_neighbors=4), dict(ordinary_dataset=references))
    with pytest.raises(RuntimeError, match="no such luck"):
        trainer.train()
    assert len(trainer.memory) == 8 * 23 and trainer.memory.config.confidence == "calibrated"


def test_nearly_all_gain_that_both_bounds_allow_is_kept(olmoe, monkeypatch):
    def bounded(mean: float, worst: float):
        monkeypatch.setattr(module, "MEAN_HARM", mean)
        monkeypatch.setattr(module, "WORST_HARM", worst)
        found = calibrate(olmoe.model, olmoe.memory, olmoe.given)[1]
        return found.gain, max(found.harm.values()), sum(found.harm.values()) / 2

    free, worst, mean = bounded(1e9, 1e9)
    assert free > 0.96 * max(olmoe.found.gain, olmoe.found.open_gain) and worst > mean > 0
    for bounds in ((1e9, 0.5 * worst), (0.5 * mean, 1e9)):
        gain, worst_then, mean_then = bounded(*bounds)
        assert 0 < gain < 1.05 * free and mean_then < bounds[0] and worst_then < bounds[1]


def seen(evidence: torch.Tensor, rise: float, half_rise: float) -> Observation:
    """Of tokens that look like this, to a memory that changes all of them alike."""
    means, alike = {0: evidence}, torch.ones_like(evidence)
    return Observation(means, means, 0 * alike, {0: 0.0}, 1.0, rise * alike, half_rise * alike, alike)


@pytest.mark.parametrize("spread, widest", [(0.8, True), (0.08, False)])
def test_a_memory_opens_softly_where_background_text_cannot_be_told_from_the_references(spread, widest):
    """Evidence of both overlaps or not; half open the memory has 0.7 of its gain and does a fifth of its harm."""
    stats = {0: stats_of(random_memory(tiny_model("olmoe")), 0)}
    around = spread * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    references, other = seen(1 + around, -0.4, -0.28), seen(around, 0.1, 0.02)
    width, place = module._expected_best(stats, references, {"other": other})
    fitted = module._at(stats, module._THRESHOLDS[place], width)
    assert (width == module._WIDTHS[0]) == widest
    assert other.change(module._mean_opening(fitted, other)) <= MEAN_HARM
    narrow = [module._at(stats, threshold, module._WIDTHS[-1]) for threshold in module._THRESHOLDS]
    within = [one for one in narrow if other.change(module._mean_opening(one, other)) <= MEAN_HARM]
    best = max(-references.change(module._mean_opening(one, references)) for one in within)
    kept = -references.change(module._mean_opening(fitted, references))
    assert kept > 1.1 * best if widest else kept > 0.97 * best


def test_a_memory_opens_no_further_than_most_of_its_gain_asks_for():
    """Background text is not harmed at all, so that only the gain on the references speaks against a threshold."""
    stats = {0: stats_of(random_memory(tiny_model("olmoe")), 0)}
    around = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    references, other = seen(1 + 0.3 * around, -0.4, -0.28), seen(0.3 * around, 0.0, 0.0)
    width, place = module._expected_best(stats, references, {"other": other})
    threshold, higher = module._THRESHOLDS[place], module._THRESHOLDS[place + 1]
    gains = [
        -references.change(module._mean_opening(module._at(stats, t, width), references)) for t in (threshold, higher)
    ]
    assert gains[0] >= 0.95 * 0.4 and (gains[1] < 0.95 * 0.4 or higher > 0.5)
    assert 0.2 < threshold <= 0.5


def test_the_threshold_is_raised_if_the_measured_harm_exceeds_the_predicted_harm(olmoe, monkeypatch):
    expected = module._expected
    monkeypatch.setattr(module, "_expected", lambda *given: dict.fromkeys(expected(*given), 0.0))
    fitted, found = calibrate(olmoe.model, olmoe.memory, olmoe.given)
    assert found.threshold > module._THRESHOLDS[0]
    costs = [harm(olmoe.model, fitted, rows) for rows in olmoe.background.values()]
    assert max(costs) <= WORST_HARM + 1e-6 and sum(costs) <= 2 * MEAN_HARM + 1e-6


def test_if_no_threshold_is_high_enough_the_highest_is_chosen_and_the_verdict_says_that_nothing_is_kept(
    olmoe, monkeypatch, caplog
):
    monkeypatch.setattr(module, "MEAN_HARM", -1.0)
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        fitted, found = calibrate(olmoe.model, olmoe.memory, olmoe.background)
    assert not caplog.text and found.threshold == 100.0
    assert fitted.verdict.kept == pytest.approx(0, abs=1e-6) and fitted.verdict.open_gain.mean < -0.2
    assert "confidence='calibrated' keeps" in fitted.verdict.sentences()[0]
    assert harm(olmoe.model, fitted, olmoe.background["one"]) == 0 and found.gain == pytest.approx(0, abs=1e-6)


# when there is nothing to calibrate with


def falls_back(caplog, case, memory, background, words: str) -> None:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        same, found = calibrate(case.model, memory, background)
    assert found is None and all(rows.stats is None for rows in same.layers.values())
    assert_same(replace(same, calibration=memory.calibration), memory)
    if any(map(len, background.values())):  # what was read is recorded all the same
        assert set(same.calibration.background) == set(background) and same.calibration.threshold is None
        assert all(text["sha256"] for text in same.calibration.background.values())
    else:
        assert same.calibration is None
    assert words in caplog.text and "falls back to 'context'" in caplog.text


def test_without_background_text_the_memory_falls_back(olmoe, caplog):
    for nothing in ({}, {"empty": []}, {"empty": [], "too": datasets.Dataset.from_list([])}):
        falls_back(caplog, olmoe, olmoe.memory, nothing, "no background text")


def test_background_text_without_targets_is_ignored(olmoe, caplog):
    blank = [{"input_ids": [1, 2, 3], "labels": [-100] * 3, "attention_mask": [1] * 3, "example_id": 0}]
    single = [{"input_ids": [1], "labels": [1], "attention_mask": [1], "example_id": 0}]
    falls_back(caplog, olmoe, olmoe.memory, {"blank": blank, "single": single}, "no background text")
    fitted, found = calibrate(olmoe.model, olmoe.memory, olmoe.given | {"blank": blank, "empty": []})
    assert replace(found, background=olmoe.found.background) == olmoe.found
    assert_same(replace(fitted, calibration=olmoe.found), olmoe.fitted)
    assert found.background["empty"]["examples"] == 0 and found.background["blank"]["tokens"] == 3


def test_a_single_token_of_background_text_gives_stats_that_can_be_saved(olmoe, tmp_path):
    fitted = found = None
    for one in olmoe.background["one"]:
        ids = one["input_ids"][:2]
        single = [{"input_ids": ids, "labels": ids, "attention_mask": [1, 1], "example_id": 0}]
        fitted, found = calibrate(olmoe.model, olmoe.memory, {"single": single})
        if found is not None:  # the memory improves some tokens by chance, and these are no background text
            break
    assert found is not None
    fitted.save_pretrained(tmp_path)
    assert_same(RoutingMemory.from_pretrained(tmp_path), fitted)


def test_background_text_that_the_memory_improves_is_excluded(olmoe, caplog):
    with caplog.at_level(logging.INFO, "knnmoe_hf"):
        calibrate(olmoe.model, olmoe.memory, {"a": domain(8, 77)})
        assert "calibrating with background text 'a' (given): 8 examples" in caplog.text
    falls_back(caplog, olmoe, olmoe.memory, {"a": domain(8, 77), "b": domain(8, 78)}, "helps on all background text")


def test_without_references_to_hold_out_the_memory_falls_back(olmoe, caplog, tmp_path):
    bare = random_memory(olmoe.model)
    few = olmoe.memory.remove_examples(range(7, 48))
    olmoe.memory.save_pretrained(tmp_path, provenance="none")
    falls_back(caplog, olmoe, few, olmoe.background, "no references that can be held out")
    for memory in (bare, RoutingMemory.from_pretrained(tmp_path)):
        falls_back(caplog, olmoe, memory, olmoe.background, "no text of the references, which provenance='ids'")
    assert calibrate(olmoe.model, olmoe.memory.remove_examples(range(8, 48)), olmoe.given)[1] is not None


# side effects


def test_calibration_works_inside_disable_memory(olmoe):
    attach_memory(olmoe.model, olmoe.memory)
    try:
        with disable_memory(olmoe.model):
            assert calibrate(olmoe.model, olmoe.memory, olmoe.given)[1] == olmoe.found
            assert not RoutingHooks.of(olmoe.model).current
    finally:
        detach_memory(olmoe.model)


def test_calibration_restores_the_model_and_leaves_its_memory_unchanged(case):
    model = case.model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model.model.layers[0].eval()
    modes = {name: part.training for name, part in model.named_modules()}
    memory = domain_memory(model.config.model_type, "calibrated")
    before = copy.deepcopy(memory)
    fitted, found = calibrate(model, memory, case.given)
    assert RoutingHooks.of(model) is None
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())
    model.eval()
    assert_same(memory, before)
    assert found == case.found  # although the model was in training mode
    assert_same(fitted, case.fitted)
    assert fitted.config.confidence == "calibrated" and len(fitted) == len(memory)


def test_attached_memories_stay_attached_and_have_no_influence(case):
    model, ids = case.model, torch.arange(24)[None]
    for name, seed in (("first", 1), ("second", 2)):
        attach_memory(model, random_memory(model, seed=seed), name)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    kept = get_memory(model, "first"), get_memory(model, "second")
    fitted, found = calibrate(model, case.memory, case.given)
    assert found == case.found
    assert_same(fitted, case.fitted)
    assert active_memory(model) == "second"
    assert (get_memory(model, "first"), get_memory(model, "second")) == kept
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted)
    detach_memory(model)


def test_a_memory_that_is_attached_itself_can_be_calibrated(olmoe):
    attach_memory(olmoe.model, olmoe.memory)
    try:
        assert calibrate(olmoe.model, olmoe.memory, olmoe.given)[1] == olmoe.found
        assert get_memory(olmoe.model) is olmoe.memory and active_memory(olmoe.model) == "default"
    finally:
        detach_memory(olmoe.model)


def test_a_calibrated_memory_can_be_calibrated_again(olmoe):
    again, found = calibrate(olmoe.model, olmoe.fitted, olmoe.given)
    assert found == olmoe.found
    assert_same(again, olmoe.fitted)


def test_a_calibration_is_saved_with_the_memory(case, tmp_path):
    case.fitted.save_pretrained(tmp_path)
    loaded = RoutingMemory.from_pretrained(tmp_path)
    assert_same(loaded, case.fitted)
    assert all(isinstance(rows.stats, CalibrationStats) for rows in loaded.layers.values())
    assert harm(case.model, loaded, case.background["one"]) == harm(case.model, case.fitted, case.background["one"])
    bare = RoutingMemory.from_pretrained(tmp_path, layers=[1])
    assert bare.layers[1].stats == case.fitted.layers[1].stats


def test_results_do_not_depend_on_how_background_text_is_batched(olmoe):
    """Rows of different lengths, so that other batches have other padding."""
    cut = [
        {name: column[:length] if name != "example_id" else column for name, column in one.items()}
        for one, length in zip(olmoe.background["one"], [24, 9, 17, 2] * 6)
    ]
    fitted, found = calibrate(olmoe.model, olmoe.memory, {"cut": cut})
    other, alike = calibrate(olmoe.model, olmoe.memory, {"cut": sorted(cut, key=lambda one: len(one["labels"]))})
    assert found.threshold == alike.threshold and found.harm["cut"] == pytest.approx(alike.harm["cut"], abs=1e-4)
    for layer, rows in fitted.layers.items():
        assert vars(rows.stats) == pytest.approx(vars(other.layers[layer].stats), rel=1e-3)


# through the trainer

FORMS = {
    "text": [{"text": "the gate routes a token"}],
    "input_ids": [{"input_ids": list(range(40, 60)), "labels": list(range(40, 60))}],
    "completion": [{"prompt": "the gate ", "completion": "routes a token"}],
    "messages": [
        {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "the gate routes"}]}
    ],
}


@pytest.fixture(scope="module")
def bytewise():
    return tiny_model("olmoe", vocab_size=260)


def build(model, tmp_path, ordinary_dataset, tokenizer=None):
    references = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in domain(16, 0, length=10)]
    options = dict(processing_class=tokenizer, ordinary_dataset=ordinary_dataset)
    config = dict(num_neighbors=4, gamma=0.1)
    more = dict(per_device_train_batch_size=16, builder_steps=4, max_length=30)
    trainer = trainer_for(model, tmp_path, references, config, options, **more)
    trainer.train()
    detach_memory(model)
    return trainer


@pytest.mark.parametrize("kind", ["list", "dataset", "by kind"])
def test_background_text_may_have_any_form(bytewise, tmp_path, kind):
    tokenizer, own = byte_tokenizer(MARKED), own_text(bytewise, 6, 3)
    rows = [{name: one[name] for name in ("input_ids", "labels")} for one in own] + sum(FORMS.values(), [])
    columns = {name: [one.get(name) for one in rows] for name in {name for one in rows for name in one}}
    given = {"list": rows, "dataset": datasets.Dataset.from_dict(columns), "by kind": {"a": rows, "b": rows[:7]}}[kind]
    trainer = build(bytewise, tmp_path, given, tokenizer)
    prepared = prepare_dataset(rows, tokenizer, 30)
    kinds = {"a": prepared, "b": prepared[:7]} if kind == "by kind" else {"given": prepared}
    fitted, wanted = calibrate(bytewise, trainer.memory, kinds, 16)
    assert trainer.calibration == wanted and set(wanted.harm) == set(kinds)
    assert_same(trainer.memory, fitted)
    for left_out in range(6, 9):  # a row of each form is used
        fewer = [one for index, one in enumerate(prepared) if index != left_out]
        assert calibrate(bytewise, trainer.memory, kinds | {next(iter(kinds)): fewer}, 16)[1] != wanted


def test_other_confidences_need_no_background_text(tmp_path, caplog):
    model = tiny_model("olmoe")
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        trainer = trainer_for(model, tmp_path, config=dict(confidence="rbf"))
        trainer.train()
    assert trainer.calibration is None and "calibrat" not in caplog.text


def test_a_build_without_tokenizer_and_background_text_falls_back(bytewise, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        trainer = build(bytewise, tmp_path, None)
    assert trainer.calibration is None and trainer.memory.layers[0].stats is None
    assert trainer.memory.config.confidence == "calibrated"
    _, cost, way_out = trainer.memory.verdict.sentences()  # which say it, so that no warning does
    assert "no background text" in cost and "ordinary_dataset" in way_out and "fell back to 'context'" in way_out
    assert not caplog.text


def test_a_build_with_a_tokenizer_uses_text_of_this_machine(bytewise, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "knnmoe_hf.calibration"):
        build(bytewise, tmp_path, None, byte_tokenizer())
    assert all(kind in caplog.text for kind in KINDS)  # each is named, as harmed or as improved


def test_what_a_calibration_reads_is_recorded_in_the_memory_and_logged(olmoe, tmp_path, caplog):
    texts = {kind: BackgroundText(rows, "this machine", [f"{kind}.txt"]) for kind, rows in olmoe.background.items()}
    with caplog.at_level(logging.INFO, "knnmoe_hf.calibration"):
        fitted, found = calibrate(olmoe.model, olmoe.memory, texts)
    for kind, record in found.background.items():
        assert record["source"] == "this machine" and record["files"] == [f"{kind}.txt"]
        assert record["examples"] == 24 and record["tokens"] == 24 * 24
        assert f"background text '{kind}' (this machine)" in caplog.text and record["sha256"][:16] in caplog.text
    fitted.save_pretrained(tmp_path)
    assert RoutingMemory.from_pretrained(tmp_path).calibration == fitted.calibration == found


def test_a_calibration_on_given_text_records_that_text(olmoe):
    read = olmoe.found.background
    assert set(read) == set(olmoe.given) and olmoe.fitted.calibration == olmoe.found
    assert {record["source"] for record in read.values()} == {"given"} and not any(r["files"] for r in read.values())
    assert [record["examples"] for record in read.values()] == [len(rows) for rows in olmoe.given.values()]


def test_calibrating_needs_no_lab_and_prepares_once(olmoe, monkeypatch):
    probes, resets = [], []
    monkeypatch.setattr(logits_probe, "probe_model", lambda model: probes.append(1) or probe_model(model))
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    calibrate(olmoe.model, olmoe.memory, olmoe.background)
    assert len(probes) == 1 and len(resets) == 2  # when the first hook is registered and when the last one is removed
    code = "import sys, knnmoe_hf.calibration.calibrate, knnmoe_hf.training.trainer;"
    code += "assert not any(name.startswith('knnmoe_hf.lab') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
