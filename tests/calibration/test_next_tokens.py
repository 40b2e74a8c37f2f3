"""Calibration of recalled next tokens: what is fitted, and what it does, measured again by forward passes."""

import logging
from dataclasses import replace

import pytest
import torch

from knnmoe_hf import RoutingMemory, calibrate
from knnmoe_hf.calibration import recall as module
from knnmoe_hf.calibration.calibrate import MEAN_HARM, WORST_HARM
from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.calibration.next_tokens import Seen, fit_next_tokens
from knnmoe_hf.calibration.observe import Observation
from knnmoe_hf.calibration.recall import fit_recalls
from knnmoe_hf.calibration.votes import TEMPERATURES, Votes
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.evaluation.scores import score
from knnmoe_hf.models.attach import prepare, watch_lookups
from tests.conftest import tiny_model
from tests.support.attaching import attached
from tests.support.domain import domain, domain_memory, own_text

BOUNDS = (MEAN_HARM, WORST_HARM)


def nll(model, rows) -> float:
    return score(model, rows, 8).mean_nll


def using(memory: RoutingMemory, recall: str, **options) -> RoutingMemory:
    """The memory with other options of recall."""
    memory = replace(memory)
    for name, value in {"recall": recall, **options}.items():
        setattr(memory.config, name, value)
    return replace(memory)


@pytest.fixture(scope="module")
def olmoe():
    return tiny_model("olmoe")


@pytest.fixture(scope="module")
def background(olmoe):
    return {"one": own_text(olmoe, 24, 1), "two": own_text(olmoe, 24, 2, temperature=0.8)}


@pytest.fixture(scope="module")
def fitted(olmoe, background):
    return calibrate(olmoe, domain_memory("olmoe", "calibrated"), background)[0]


@pytest.fixture(scope="module")
def changes(olmoe, fitted, background):
    """`{recall: {kind: change of the NLL}}`, of the domain and of background text."""
    texts = background | {"domain": domain(24, 5)}
    before = {kind: nll(olmoe, rows) for kind, rows in texts.items()}
    found = {}
    for recall in ("routing", "next_tokens", "both"):
        with attached(olmoe, using(fitted, recall)):
            found[recall] = {kind: nll(olmoe, rows) - before[kind] for kind, rows in texts.items()}
    return found


def test_each_way_of_recall_gains_on_the_domain_within_the_bounds_of_harm(fitted, changes):
    assert set(fitted.calibration.fits) == {"next_tokens", "both"}
    for recall, fit in fitted.calibration.fits.items():
        assert 0 < fit.next_token_weight < 1 and fit.next_token_neighbors == 64, recall
        costs = [changes[recall][kind] for kind in ("one", "two")]
        assert max(costs) <= WORST_HARM + 1e-5 and sum(costs) <= 2 * MEAN_HARM + 1e-5, recall
        assert changes[recall]["domain"] < -0.1, recall
    assert changes["both"]["domain"] < 2 * changes["routing"]["domain"] < 0


def test_the_record_says_the_harm_as_it_is_measured(fitted, changes):
    """That of tokens alone is known without running the model with them, as exactly as if it had been run."""
    for recall, fit in fitted.calibration.fits.items():
        assert fit.harm == pytest.approx({kind: changes[recall][kind] for kind in ("one", "two")}, abs=2e-5), recall


@pytest.mark.parametrize("recall", ["next_tokens", "both"])
def test_the_gain_is_that_on_held_out_references(olmoe, fitted, recall):
    held = hold_out(fitted)
    before = nll(olmoe, held.rows)
    with attached(olmoe, using(fitted.take(held.rest), recall)):
        gain = before - nll(olmoe, held.rows)
    assert fitted.calibration.fits[recall].gain == pytest.approx(gain, abs=1e-4)


@pytest.mark.parametrize("gain", ["less", "more"])
def test_routing_stays_shut_where_tokens_are_measured_to_gain_more_without_it(olmoe, fitted, gain):
    """As where routing moves the last layer's queries away from the keys of what comes next."""
    found = fit_recalls(
        prepare(olmoe, using(fitted, "both")),
        lambda observation, threshold: replace(observation, opening=0.0 if threshold is None else 0.1),
        seen(1.0, 2.0, 0.9),
        {kind: seen(0.1, 2.0, 0.0) for kind in fitted.calibration.harm},
        lambda fit: (fit.gain + {"less": -0.5, "more": 0.1}[gain], fit.harm),
        BOUNDS,
    )
    alone, both = found["next_tokens"], found["both"]
    assert (both.routing_threshold == module.NEVER) == (gain == "less") and alone.routing_threshold is None
    assert gain == "more" or both == replace(alone, routing_threshold=module.NEVER)


def test_with_routing_a_memory_opens_it_no_earlier_than_alone(olmoe, fitted):
    threshold = fitted.calibration.fits["both"].routing_threshold
    assert threshold >= fitted.calibration.threshold
    for recall, wanted in (("both", threshold), ("routing", fitted.calibration.threshold)):
        layers = prepare(olmoe, using(fitted, recall)).values()
        assert {lookup.confidence.stats.threshold for lookup in layers} == {wanted}


def test_routing_is_fitted_as_without_next_tokens(olmoe, fitted, background, monkeypatch, caplog):
    def refuse(model):
        raise UnsupportedModelError("this model mixes nothing")

    monkeypatch.setattr(module, "probe_logits", refuse)
    with caplog.at_level(logging.INFO, logger="knnmoe_hf"):
        alone, record = calibrate(olmoe, domain_memory("olmoe", "calibrated"), background)
    assert record.fits == {} and "this model mixes nothing" in caplog.text
    assert {layer: rows.stats for layer, rows in alone.layers.items()} == {
        layer: rows.stats for layer, rows in fitted.layers.items()
    }
    assert replace(fitted.calibration, fits={}) == record


def test_what_recall_the_memory_is_set_to_does_not_change_the_fit(olmoe, fitted, background):
    again, record = calibrate(olmoe, using(domain_memory("olmoe", "calibrated"), "both"), background)
    assert record == fitted.calibration and again.config.recall == "both"
    assert again.verdict.settings["recall"] == "both"
    assert again.verdict.gain.mean < calibrate(olmoe, fitted, background)[0].verdict.gain.mean


def test_a_saved_memory_opens_with_the_fit_of_the_recall_that_is_asked_for(fitted, olmoe, tmp_path):
    fitted.save_pretrained(tmp_path)
    opened = RoutingMemory.from_pretrained(tmp_path, recall="both")
    assert opened.calibration == fitted.calibration
    layers = prepare(olmoe, opened)
    assert layers[max(layers)].voting.fit == fitted.calibration.fits["both"]


def test_an_explicit_weight_counts_by_the_confidence_alone(olmoe, fitted):
    """And then the votes have the layer's own opening."""
    rows, events = domain(4, 6), []
    with attached(olmoe, using(fitted, "both", next_token_weight=0.3)), watch_lookups(olmoe, events.append):
        nll(olmoe, rows)
    last = [event for event in events if event.recalled is not None]
    assert last
    for event in last:
        weight = event.recalled.weighted(torch.device("cpu"))[2]
        torch.testing.assert_close(weight, 0.3 * event.confidence)


def test_an_explicit_temperature_leaves_the_fitted_weight(olmoe, fitted):
    layers = prepare(olmoe, using(fitted, "both", next_token_temperature=0.7))
    votes = layers[max(layers)].voting
    assert votes.temperature == 0.7 and votes.fit == fitted.calibration.fits["both"]


def test_a_fit_for_other_voters_is_not_used_with_a_warning(olmoe, fitted, caplog):
    layers = prepare(olmoe, using(fitted, "both", next_token_neighbors=9))
    assert layers[max(layers)].voting.fit is None
    assert "fitted for next_token_neighbors=64, not 9" in caplog.text


def seen(similar: float, nll: float, recalled: float, n: int = 8) -> Seen:
    """Tokens that all look the same: how much like the references, and what model and votes give the target."""
    zeros, votes = torch.zeros(n), {t: torch.full((n,), recalled) for t in TEMPERATURES}
    trusts = {t: torch.full((n,), 0.5) for t in TEMPERATURES}
    given = Votes(0, torch.full((n,), similar), votes, trusts)
    nlls = torch.full((n,), nll)
    observation = Observation({}, {}, zeros, {}, nll, zeros, zeros, nlls, given)
    return Seen(observation, torch.full((n,), similar), 0.0)


def test_the_weight_falls_to_0_where_the_least_that_tokens_count_harms_too_much():
    """Background text looks like the references, and what is recalled is never what follows."""
    fit = fit_next_tokens(seen(1.0, 2.0, 0.9), {"alike": seen(1.0, 2.0, 0.0)}, 64, (1e-4, 1e-4))
    assert fit.next_token_weight == 0 and fit.gain == pytest.approx(0) and fit.harm == {"alike": pytest.approx(0)}


def test_the_weight_is_0_where_nothing_is_gained():
    fit = fit_next_tokens(seen(1.0, 2.0, 0.0), {"other": seen(0.0, 2.0, 0.0)}, 64, BOUNDS)
    assert fit.next_token_weight == 0


def test_of_fits_within_the_bounds_nearly_the_best_that_costs_least_is_taken():
    references, other = seen(1.0, 2.0, 0.9), seen(0.1, 2.0, 0.0)
    fit = fit_next_tokens(references, {"other": other}, 64, BOUNDS)
    loose = fit_next_tokens(references, {"other": other}, 64, (1.0, 1.0))
    assert fit.next_token_weight > 0.3 and fit.gain > 0.5 and fit.harm["other"] <= MEAN_HARM
    assert fit.gain < loose.gain and loose.harm["other"] > MEAN_HARM


def test_what_routing_costs_leaves_less_for_tokens():
    references, other = seen(1.0, 2.0, 0.9), {"other": seen(0.3, 2.0, 0.0)}
    free, spent = (fit_next_tokens(references, other, 64, BOUNDS, {"other": cost}) for cost in (0.0, 0.0039))
    assert spent.harm["other"] <= MEAN_HARM and spent.harm["other"] - 0.0039 < free.harm["other"]
    beyond = fit_next_tokens(references, other, 64, BOUNDS, {"other": 0.005})
    assert beyond.next_token_weight == 0 and beyond.harm["other"] == pytest.approx(0.005)
