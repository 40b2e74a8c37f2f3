"""Calibration of tiny models: what it reports is measured again by forward passes of the model."""

import logging

import numpy as np
import pytest
import torch

from knnmoe_hf import calibrate
from knnmoe_hf.calibration import calibrate as module
from knnmoe_hf.calibration.calibrate import MEAN_HARM, WORST_HARM
from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.calibration.observe import Observation
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.models.attach import watch_lookups
from tests.calibration.helpers import at, harm
from tests.calibration.test_builds import build
from tests.conftest import random_memory, tiny_model
from tests.memory.helpers import assert_same
from tests.support.attaching import attached
from tests.support.domain import domain, domain_memory, own_text
from tests.support.stats import stats_of, with_stats
from tests.support.tokenizers import byte_tokenizer


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
