"""Metrics as modules of `evaluate`: loaded without a network, equal to what the harness and the package compute."""

import os
import subprocess
import sys

import evaluate
import numpy
import pytest
import torch

from knnmoe_hf.evaluation import metrics
from knnmoe_hf.evaluation.routing import record_routing
from knnmoe_hf.evaluation.scores import Scores, mean_change, paired_bootstrap
from tests.support.attaching import attached
from tests.support.models import random_memory, tiny_model

ROUTES = dict(
    base_expert_ids=[[[0, 1], [2, 3]], [[1, 2], [0, 1]]],
    base_expert_weights=[[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]],
    expert_ids=[[[1, 0], [2, 1]], [[1, 2], [0, 1]]],
    expert_weights=[[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]],
)
ITEMS = dict(
    predictions=[[-1.0, -2.0, -9.0], [-3.0, -2.5], [-4.0, -4.0]],
    references=[1, 0, 0],
    choices=[["a", "abcd", "abc"], ["naïve", "no"], ["x", "y"]],
)
TEXTS = dict(loglikelihoods=[-12.5, -3.25], token_counts=[5, 2])
NAN = float("nan")
ONE_TOKEN = dict(base_expert_ids=[[[0]]], base_expert_weights=[[[1.0]]], expert_ids=[[[1]]], expert_weights=[[[1.0]]])
CHANGES = dict(base_scores=[0, 0, 1, 0, 1, 0, 1, 1], scores=[1, 0, 1, 1, 1, 0, 0, 1])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Scores that wait for `compute` are written to the cache of metrics, which other test processes use too."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)


def test_multiple_choice_accuracy_equals_that_by_hand():
    # raw: 0, 1, 0 (the first of equals); by characters: -1, -0.5, -3 / -0.6, -1.25 / -4, -4; by bytes -0.5 for naïve
    found = metrics.load("multiple_choice_accuracy").compute(**ITEMS)
    assert found == {"acc": 1 / 3, "acc_norm": 1.0, "acc_bytes": 1.0}
    wide = dict(predictions=[[-4.0, -3.5]], references=[0], choices=[["ïï", "abc"]])
    assert metrics.load("multiple_choice_accuracy").compute(**wide) == {"acc": 0, "acc_norm": 0, "acc_bytes": 1}


@pytest.mark.parametrize("seed", range(3))
def test_multiple_choice_accuracy_is_the_harness_s(seed):
    task_module = pytest.importorskip("lm_eval.api.task")
    generator = numpy.random.default_rng(seed)
    texts = ["no", "maybe so", "ça va", "日本語", "a longer answer than the others", "x"]
    documents = []
    for _ in range(40):
        count = int(generator.integers(2, 6))
        choices = [str(text) for text in generator.choice(texts, count, replace=False)]
        scores = [-float(abs(generator.normal())) * len(text) for text in choices]
        documents.append(dict(choices=choices, gold=int(generator.integers(count)), scores=scores))

    class Items(task_module.ConfigurableTask):
        """A task of the harness on documents that are given, so that its own scoring runs."""

        def download(self, dataset_kwargs=None, **kwargs):
            import datasets

            self.dataset = {"test": datasets.Dataset.from_list(documents)}

    names = ("acc", "acc_norm", "acc_bytes")
    task = Items(
        config=dict(
            task="items",
            test_split="test",
            output_type="multiple_choice",
            doc_to_text="?",
            doc_to_choice="choices",
            doc_to_target="gold",
            metric_list=[dict(metric=name, aggregation="mean", higher_is_better=True) for name in names],
        )
    )
    of_harness = [task.process_results(doc, [(score, False) for score in doc["scores"]]) for doc in documents]
    found = metrics.load("multiple_choice_accuracy").compute(
        predictions=[doc["scores"] for doc in documents],
        references=[doc["gold"] for doc in documents],
        choices=[doc["choices"] for doc in documents],
    )
    assert found == {
        name: pytest.approx(task.aggregation()[name]([one[name] for one in of_harness])) for name in names
    }
    assert len(set(found.values())) > 1


def test_perplexity_is_the_harness_s():
    of_harness = pytest.importorskip("lm_eval.api.metrics")
    found = metrics.load("perplexity").compute(**TEXTS)
    assert found["perplexity"] == pytest.approx(numpy.exp(15.75 / 7))
    assert found["mean_nll"] == 15.75 / 7
    pairs = list(zip(*TEXTS.values()))
    assert found["perplexity"] == pytest.approx(of_harness.weighted_perplexity(pairs), rel=1e-15)
    each = metrics.load("perplexity").compute(loglikelihoods=TEXTS["loglikelihoods"], token_counts=[1, 1])
    assert each["perplexity"] == pytest.approx(of_harness.perplexity(TEXTS["loglikelihoods"]), rel=1e-15)
    long_text = metrics.load("perplexity").compute(loglikelihoods=[-2000.0], token_counts=[1])
    assert long_text == {"perplexity": float("inf"), "mean_nll": 2000.0}  # no float is as large


def test_routing_change_and_load_by_hand():
    found = metrics.load("routing_change").compute(**ROUTES)
    assert found["changed_by_layer"] == [0, 0.5] and found["changed"] == 0.25
    assert found["divergence_by_layer"] == [0, pytest.approx(numpy.log(2) / 4)]
    load = metrics.load("expert_load").compute(
        expert_ids=ROUTES["expert_ids"], expert_weights=ROUTES["expert_weights"], num_experts=4
    )
    assert load["load_max_over_mean_by_layer"] == [pytest.approx(2), pytest.approx(2)]
    assert load["load_entropy_by_layer"][0] == pytest.approx(1.5 * numpy.log(2) / numpy.log(4))
    assert load["load_variation"] == pytest.approx(numpy.sqrt(0.5))


def test_routing_metrics_are_those_of_recordings():
    model, ids = tiny_model("olmoe"), torch.arange(12)[None]
    with torch.no_grad(), record_routing(model) as base:
        model(input_ids=ids)
    with torch.no_grad(), attached(model, random_memory(model)), record_routing(model) as record:
        model(input_ids=ids)
    change = base.change_to(record)
    columns = base.columns("base_") | record.columns()
    found = metrics.load("routing_change").compute(**columns)
    assert change.mean_changed > 0
    assert found["changed_by_layer"] == list(change.changed.values())
    assert found["divergence_by_layer"] == pytest.approx(list(change.divergence.values()), abs=1e-15)
    load = metrics.load("expert_load").compute(**record.columns(), num_experts=8)
    assert load["load_entropy_by_layer"] == [one.entropy for one in record.load().values()]


def test_paired_bootstrap_is_that_of_the_package():
    found = metrics.load("paired_bootstrap").compute(**CHANGES)
    before, after = (torch.tensor(values, dtype=torch.float64) for values in CHANGES.values())
    ones = torch.ones(8, dtype=torch.float64)
    change = paired_bootstrap(Scores(before, ones, ones), Scores(after, ones, ones))
    assert (found["mean_change"], found["mean_change_low"], found["mean_change_high"]) == (
        change.mean,
        change.low,
        change.high,
    )
    assert mean_change(before, after) == change and change.mean == 0.125 and found["mean_change_items"] == 8
    other = metrics.load("paired_bootstrap").compute(**CHANGES, resamples=50, resampling_seed=1)
    assert other["mean_change_low"] == mean_change(before, after, 50, 1).low
    few = metrics.load("paired_bootstrap").compute(base_scores=[0, 1], scores=[1, 1])
    assert few["mean_change"] == 0.5 and few["mean_change_low"] is None


def test_all_metrics_share_one_call_of_a_combination():
    alone = {}
    for name, inputs in (
        ("multiple_choice_accuracy", ITEMS),
        ("perplexity", TEXTS),
        ("routing_change", ROUTES),
        ("paired_bootstrap", CHANGES),
    ):
        alone |= metrics.load(name).compute(**inputs)
    of_load = {name: ROUTES[name] for name in ("expert_ids", "expert_weights")}
    alone |= metrics.load("expert_load").compute(**of_load, num_experts=4)
    combined = evaluate.combine([metrics.path(name) for name in metrics.METRICS])
    found = combined.compute(**ITEMS, **TEXTS, **ROUTES, **CHANGES, num_experts=4)
    assert found == alone
    assert not any(key.startswith(metrics.METRICS) and key != "perplexity" for key in found)  # no names collided
    in_parts = evaluate.combine([metrics.load("multiple_choice_accuracy"), metrics.load("paired_bootstrap")])
    for part in (slice(0, 2), slice(2, 3)):
        items = {name: values[part] for name, values in (ITEMS | CHANGES).items()}
        in_parts.add_batch(**items)
    assert in_parts.compute()["acc"] == alone["acc"]


@pytest.mark.parametrize(
    "name, inputs, said",
    [
        ("multiple_choice_accuracy", ITEMS | dict(references=[1, 0, 2]), "item 2 has 2 log-likelihoods, 2 choices"),
        ("multiple_choice_accuracy", ITEMS | dict(choices=[["a", "", "c"], ["b", "c"], ["x", "y"]]), "none of them"),
        (
            "multiple_choice_accuracy",
            ITEMS | dict(predictions=[[-1, -2, NAN], [-3, -2], [-4, -4]]),
            "item 0 has a log",
        ),
        ("perplexity", dict(loglikelihoods=[-1.0], token_counts=[0]), r"token_counts=\[0\] is not allowed"),
        ("perplexity", dict(loglikelihoods=[-1.0, -1.0], token_counts=[-1, 2]), r"token_counts=\[-1, 2\]"),
        ("perplexity", dict(loglikelihoods=[1.0], token_counts=[1]), "none can be above 0"),
        ("routing_change", dict.fromkeys(ROUTES, []), "there is no token"),
        ("routing_change", ROUTES | dict(expert_ids=[[[1], [2, 1]], [[1, 2], [0, 1]]]), "as many weights"),
        ("routing_change", ROUTES | dict(expert_ids=[[[1, 0], [2, -7]], [[1, 2], [0, 1]]]), "ids from -7 to 2"),
        ("routing_change", dict(ONE_TOKEN, expert_ids=[[[10**9]]]), "ids from 1000000000 to"),
        ("routing_change", dict(ONE_TOKEN, expert_weights=[[[NAN]]]), "an expert weight that is negative"),
        ("routing_change", dict(ONE_TOKEN, expert_weights=[[[-0.5]]]), "an expert weight that is negative"),
        ("expert_load", {name: ROUTES[name] for name in ("expert_ids", "expert_weights")}, "num_experts=None is not"),
        ("expert_load", dict(expert_ids=[[[5]]], expert_weights=[[[1.0]]], num_experts="6"), "the largest id, 5"),
        ("expert_load", dict(expert_ids=[[[5]]], expert_weights=[[[1.0]]], num_experts=5), "the largest id, 5"),
        ("paired_bootstrap", CHANGES | dict(resamples=0), "resamples=0 is not allowed"),
        ("paired_bootstrap", dict(base_scores=[], scores=[]), "there are no items"),
    ],
)
def test_wrong_inputs_are_told(name, inputs, said):
    with pytest.raises(ValueError, match=said):
        metrics.load(name).compute(**inputs)


def test_an_unknown_metric_is_told():
    with pytest.raises(ValueError, match="metric='bleu' is not known: choose among multiple_choice_accuracy"):
        metrics.path("bleu")


def test_metrics_load_offline_in_a_fresh_cache_and_evaluation_alone_does_not_import_evaluate(tmp_path):
    code = """
import socket, sys
def refuse(*_): raise AssertionError("a metric asked for the network")
socket.socket.connect = refuse
import knnmoe_hf.evaluation
from knnmoe_hf.evaluation import metrics
assert "evaluate" not in sys.modules
import evaluate
for name in metrics.METRICS:
    print(evaluate.load(metrics.path(name)).name)
"""
    caches = {name: str(tmp_path / name) for name in ("HF_HOME", "HF_MODULES_CACHE", "HF_METRICS_CACHE")}
    environment = os.environ | caches | dict(HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.split() == list(metrics.METRICS), found.stderr
