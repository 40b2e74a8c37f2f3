"""Which confidence and which lookup each layer of a memory gets."""

import logging
from dataclasses import replace

import pytest
import torch

from knnmoe_hf import KNNMoEConfig, native
from knnmoe_hf.lookup.confidence import InContext, Rbf
from knnmoe_hf.lookup.make import Router, fit_for, make_confidences, make_lookups, reference_stats
from knnmoe_hf.lookup.native_lookup import NativeLookup
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.lookup.rules import softmax_topk
from knnmoe_hf.lookup.torch_lookup import TorchLookup
from tests.support.models import PLAIN, random_memory, tiny_model
from tests.support.stats import with_stats

DEFAULT = {name: KNNMoEConfig().options()[name] for name in PLAIN}


def test_references_that_cannot_be_compared_count_as_wholly_alike():
    rows = random_memory(tiny_model("olmoe"), rows=1, **DEFAULT).layers[0]
    stats = reference_stats(rows, KNNMoEConfig())
    assert (stats.reference_mean, stats.background_mean) == (1.0, 0.0)
    assert reference_stats(rows, KNNMoEConfig(gamma=1e9)).reference_mean == 1.0
    far = random_memory(tiny_model("olmoe"), **DEFAULT).layers[0]
    assert 0 < reference_stats(far, KNNMoEConfig(gamma=1e9)).reference_mean < 1e-5  # and no division by nothing


def test_layers_are_taken_in_the_order_of_the_model():
    memory = with_stats(random_memory(tiny_model("olmoe"), **DEFAULT))
    made = make_confidences(dict(reversed(memory.layers.items())), memory.config)
    assert made[0].previous_layer is None and made[1].previous_layer == 0


ROUTERS = {layer: Router(softmax_topk, 2) for layer in (0, 1)}


@pytest.mark.parametrize("kind", [TorchLookup, NativeLookup])
def test_lookups_are_native_where_native_code_runs(kind, monkeypatch):
    if kind is TorchLookup:
        monkeypatch.setattr(native, "on", lambda device: None)
    elif native.on(torch.device("cpu")) is None:
        pytest.skip("native code is not compiled")
    memory = random_memory(tiny_model("olmoe"), **DEFAULT)
    made = make_lookups(dict(reversed(memory.layers.items())), ROUTERS, memory.config.retrieval_options())
    assert list(made) == [0, 1] and all(type(lookup) is kind for lookup in made.values())
    assert all(lookup.rows is memory.layers[layer] and lookup.top_k == 2 for layer, lookup in made.items())


def test_layers_without_rows_get_no_lookup_and_take_no_part_in_confidences():
    memory = with_stats(random_memory(tiny_model("olmoe"), **DEFAULT))
    none = torch.zeros(len(memory), dtype=torch.bool)
    layers = {0: memory.layers[0].select(none), 1: memory.layers[1]}
    made = make_lookups(layers, ROUTERS, memory.config.retrieval_options())
    assert list(made) == [1] and made[1].confidence.previous_layer is None


def test_each_confidence_is_made_with_its_own_statistics(caplog):
    memory = with_stats(random_memory(tiny_model("olmoe"), **DEFAULT))
    options = memory.config.retrieval_options()
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        rbf, context, calibrated = (
            make_confidences(memory.layers, replace(options, confidence=name))
            for name in ("rbf", "context", "calibrated")
        )
    assert not caplog.records
    for layer, rows in memory.layers.items():
        assert type(rbf[layer]) is Rbf and type(context[layer]) is type(calibrated[layer]) is InContext
        assert calibrated[layer].stats == rows.stats
        assert context[layer].stats == reference_stats(rows, options) != rows.stats


def test_a_calibration_that_is_missing_or_for_other_options_falls_back_with_a_warning(caplog):
    memory = random_memory(tiny_model("olmoe"), **DEFAULT)
    options = memory.config.retrieval_options()
    layers = with_stats(memory).layers
    partly = {0: layers[0], 1: memory.layers[1]}
    for some, changed, words in (
        (memory.layers, options, "the memory holds no calibration"),
        (partly, options, "the memory holds no calibration"),
        (layers, replace(options, gamma=0.6), "calibrated for gamma=0.3, not 0.6"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "knnmoe_hf"):
            made = make_confidences(some, changed)
        (record,) = caplog.records
        assert words in record.getMessage() and "falls back to 'context'" in record.getMessage()
        assert all(made[layer].stats == reference_stats(rows, changed) for layer, rows in some.items())


NUMBERS = dict(next_token_weight=0.3, next_token_temperature=0.5)
FIT = RecallFit(0.7, 0.3, 0.6, 0.5, 9, 0.1, {})
OTHER_FITS = {
    "of the voters that are asked for": ({"both": FIT}, dict(next_token_neighbors=9), None),
    "of other voters": ({"both": FIT}, dict(next_token_neighbors=8), "fitted for next_token_neighbors=9, not 8"),
    "of other voters than the default": ({"both": FIT}, {}, "fitted for next_token_neighbors=9, not 64"),
    "of another recall": ({"next_tokens": FIT}, dict(next_token_neighbors=9), "not fitted by the calibration"),
    "of none, as in older memories": ({}, {}, "not fitted by the calibration"),
}


@pytest.mark.parametrize("case", OTHER_FITS)
def test_a_recall_that_the_calibration_has_not_fitted_as_it_is_used_takes_defaults_with_a_warning(case, caplog):
    fits, changed, words = OTHER_FITS[case]
    memory = with_stats(random_memory(tiny_model("olmoe"), **DEFAULT))
    options = replace(memory.config.retrieval_options(), recall="both", **changed)
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        for quiet in (dict(recall="routing"), dict(confidence="context"), NUMBERS):
            assert fit_for(memory.layers, replace(options, **quiet), {}) is None
        assert fit_for({}, options, {}) is None
        assert not caplog.records
        assert fit_for(memory.layers, options, fits) == (FIT if words is None else None)
    assert [words in record.getMessage() for record in caplog.records] == ([] if words is None else [True])
