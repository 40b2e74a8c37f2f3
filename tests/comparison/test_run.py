"""Comparisons from plan to results: what the rows say, what is resumed, what is refused."""

import json
import shutil

import pytest
import torch

from knnmoe_hf.comparison.costs import counted
from knnmoe_hf.comparison.planning import make_plan
from knnmoe_hf.comparison.run import RESULTS, Comparison
from knnmoe_hf.comparison.setup import claimed
from tests.comparison.helpers import benchmark, compared, timeless, write_tasks
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer

METHODS = [
    {"method": "constant_bias", "epochs": 1, "learning_rates": [0.3]},
    {"method": "constant_bias", "label": "nothing", "epochs": 1, "learning_rates": [0.0]},
    {"method": "router_only", "epochs": 1, "learning_rates": [0.01]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def output(folder, tmp_path_factory):
    """A comparison that ran to its end."""
    output = tmp_path_factory.mktemp("run") / "output"
    compared(folder, output, METHODS)
    return output


def rows_of(output) -> dict:
    results = json.loads((output / RESULTS).read_text())
    return {(row["method"], row["task"]): row for row in results["results"]}


def test_every_method_has_a_row_for_its_task_and_for_the_other_text(output):
    results = json.loads((output / RESULTS).read_text())
    assert results["complete"]
    methods = ("frozen", "constant_bias", "nothing", "router_only")
    assert list(rows_of(output)) == [(method, task) for method in methods for task in ("small", "other")]
    for (_, task), row in rows_of(output).items():
        assert (row["fitted_on"], row["off"]) == ("small", task == "other")
    assert results["tasks"][0]["references"]["count"] == 8
    assert [one["label"] for one in results["methods"]] == list(methods)
    assert "epochs" in results["methods"][1]["ours"]


def test_a_row_has_scores_changes_costs_and_effect(output):
    frozen, fitted = (rows_of(output)[name, "small"] for name in ("frozen", "constant_bias"))
    assert frozen["status"] == fitted["status"] == "done" and fitted["items"] == 12
    for metric in ("acc", "acc_norm", "loglikelihood"):
        change = fitted["changes"]["frozen"][metric]
        assert change["mean"] == pytest.approx(fitted["metrics"][metric] - frozen["metrics"][metric])
        assert change["low"] <= change["mean"] <= change["high"]
    assert fitted["changes"]["frozen"]["loglikelihood"]["mean"] != 0
    assert fitted["metric"] == "acc" and fitted["groups"]["small"]["items"] == 12
    cost = fitted["cost"]
    assert cost["forward"] == frozen["cost"]["forward"] and cost["backward"] == 0
    assert cost["seconds"] > 0 and cost["times_frozen"] > 0 and cost["timed_items"] > 0
    assert cost["fit_forward"] >= 8 and cost["fit_backward"] >= 4 and cost["bytes"] > 0
    assert frozen["cost"]["bytes"] == 0 and frozen["effect"] is None
    assert fitted["effect"]["on"] == "routing" and fitted["effect"]["items_changed"] > 0
    assert rows_of(output)["router_only", "small"]["effect"]["items_changed"] > 0


def test_a_method_that_changes_no_route_is_broken_and_no_zero(output):
    for task in ("small", "other"):
        row = rows_of(output)["nothing", task]
        assert (row["status"], row["metrics"], row["changes"]) == ("broken", None, {})
        assert row["reason"] == "it changed no route on any of 12 items, so its scores would say nothing about it."
        assert row["effect"]["items_checked"] == 12  # a sample is not enough to say so


@pytest.mark.slow
def test_a_memory_whose_routing_does_nothing_is_judged_by_the_next_tokens_that_it_recalls(folder, tmp_path):
    """As a calibration leaves it where next tokens gain more without routing; here the rows have learned nothing."""
    options = {"build": {"builder_steps": 1, "learning_rate": 0.0}, "config": {"confidence": "rbf"}}
    options["config"] |= {"value_space": "delta", "value_experts": None, "value_dtype": "float32"}
    compared(folder, tmp_path / "run", [{"method": name, **options} for name in ("knn_moe_both", "knn_moe")])
    rows = rows_of(tmp_path / "run")
    for task in ("small", "other"):
        assert rows["knn_moe", task]["status"] == "broken" and rows["knn_moe_both", task]["status"] == "done"
        effect = rows["knn_moe_both", task]["effect"]
        assert effect["on"] == "responses" and effect["items_changed"] > 0


def test_a_finished_comparison_is_not_run_again(folder, output):
    before = (output / RESULTS).read_text()
    plan = json.loads((output / "plan.json").read_text())
    model = tiny_model("olmoe", vocab_size=260, max_position_embeddings=256)
    plan = make_plan("tiny", METHODS, [{"name": "small", "off_tasks": ["other"]}]).with_settings(
        references=8, batch_size=3
    )
    benchmarks = {name: benchmark(folder, name) for name in ("small", "other")}
    with claimed(output, plan), counted(model) as passes:
        results = Comparison(plan, benchmarks, model, byte_tokenizer(), output).run()
    assert passes.forward == 0
    assert json.loads(before) == json.loads(json.dumps(results))


def test_a_folder_that_another_process_works_in_is_refused(tmp_path):
    plan = make_plan("tiny", METHODS, [{"name": "small"}])
    with claimed(tmp_path / "new", plan):
        with pytest.raises(ValueError, match="another process runs a comparison in .*: wait until it ends"):
            with claimed(tmp_path / "new", plan):
                pass
    with claimed(tmp_path / "new", plan):  # it ended
        pass


@pytest.mark.parametrize("share", [0.75, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.0, 0.3, 0.95))])
def test_a_comparison_goes_on_where_its_records_end(folder, output, tmp_path, share):
    """As after a kill: the last records are cut off within a line, and what comes after them is not there yet."""
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    records = sorted(
        (copy / "responses").rglob("*.jsonl"), key=lambda path: (copy / "responses" / path).stat().st_mtime_ns
    )
    lengths = [path.stat().st_size for path in records]
    left = int(sum(lengths) * share)
    for path, length in zip(records, lengths):
        kept = min(length, left)
        left -= kept
        path.write_bytes(path.read_bytes()[:kept])
    if share < 0.5:
        shutil.rmtree(copy / "fits")
        shutil.rmtree(copy / "effects")
    (copy / RESULTS).unlink()
    results = compared(folder, copy, METHODS)
    assert timeless(results) == timeless(json.loads((output / RESULTS).read_text()))


def test_another_comparison_in_the_same_folder_is_refused(folder, output, tmp_path):
    with pytest.raises(ValueError, match="holds a comparison with other settings: name a new folder, or delete it"):
        compared(folder, output, METHODS, limit=3)
    with pytest.raises(ValueError, match="holds a comparison with other methods"):
        compared(folder, output, METHODS[:1])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="holds no plan.json that can be read: name a new folder"):
        compared(folder, tmp_path / "torn", METHODS)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else: name a new or an empty folder"):
        compared(folder, tmp_path, METHODS)


def test_results_do_not_depend_on_the_batch_size(folder, output, tmp_path):
    compared(folder, tmp_path / "one", METHODS, batch_size=1)
    for name, row in rows_of(output).items():
        other = rows_of(tmp_path / "one")[name]
        for metric, value in (row["metrics"] or {}).items():
            assert other["metrics"][metric] == pytest.approx(value, abs=1e-4)


def test_an_error_of_a_method_is_told_in_its_row_and_the_others_go_on(folder, tmp_path):
    methods = [{"method": "constant_bias", "label": "bad", "learning_rates": [1e38]}, METHODS[0]]
    results = compared(folder, tmp_path / "output", methods)
    rows = {(row["method"], row["task"]): row for row in results["results"]}
    assert rows["bad", "small"]["status"] == rows["bad", "other"]["status"] == "failed"
    assert rows["bad", "small"]["reason"] and rows["bad", "small"]["metrics"] is None
    assert rows["constant_bias", "small"]["status"] == "done"


def test_off_domain_tasks_have_a_limit_of_their_own(folder, tmp_path):
    rows = compared(folder, tmp_path / "output", ["frozen"], limit=3, off_limit=2)["results"]
    assert {row["task"]: row["items"] for row in rows} == {"small": 3, "other": 2}


def test_methods_are_compared_on_the_same_references_whatever_the_limit(folder, tmp_path):
    found = [compared(folder, tmp_path / str(n), ["frozen"], limit=n)["tasks"][0] for n in (2, 5)]
    assert found[0]["references"]["digest"] == found[1]["references"]["digest"]
    assert [task["items"] for task in found] == [2, 5]


def test_what_a_run_left_that_was_killed_while_it_wrote_is_cleared_away(tmp_path):
    plan = make_plan("tiny", METHODS, [{"name": "small"}])
    (tmp_path / ".plan.json-abcd_123").write_text("{")  # before there was a plan
    with claimed(tmp_path, plan):
        assert {path.name for path in tmp_path.iterdir()} == {"plan.json", ".lock"}
    for name in ("plan.json", RESULTS, "report.html", "report.md"):
        (tmp_path / f".{name}-12345678").write_text("{")
    with claimed(tmp_path, plan):
        assert {path.name for path in tmp_path.iterdir()} == {"plan.json", ".lock"}


def test_an_interrupt_that_a_library_took_for_another_error_is_no_failure_of_the_method(folder, tmp_path, monkeypatch):
    def quantile(*_, **__):
        raise RuntimeError("it ended early") from KeyboardInterrupt()

    monkeypatch.setattr(torch, "quantile", quantile)  # of DSMoE's importances
    with pytest.raises(RuntimeError, match="it ended early"):
        compared(folder, tmp_path / "output", ["dsmoe", METHODS[0]], [{"name": "small"}], limit=2)
    assert rows_of(tmp_path / "output")["dsmoe", "small"]["status"] == "pending"
