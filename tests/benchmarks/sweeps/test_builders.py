"""The sweep of the builders: its trials, its records and its page."""

import json

import pytest

from benchmarks.sweeps import builders
from benchmarks.sweeps.builders import GRID, Trial, build_arguments, merged, report, trials


def record(**changed) -> dict:
    found = dict(
        commit="abc1234", command="python -m benchmarks.sweeps.builders", model="olmoe", kind="topics", seed=0
    )
    found |= dict(tokens=512, held_out=2, trial="topk", rows=510, seconds=5.1, nll_before=4.0, nll_after=2.0)
    found |= dict(tokens_worse=0.012, experts_changed=0.5)
    return found | {name: [-0.1, -0.2, 0.0] for name in ("in", "against_first", "off")} | changed


def test_trials_change_one_constant_of_one_builder():
    every = list(trials("all"))
    assert len({trial.name for trial in every}) == len(every)
    assert all(len(trial.changed) <= 1 for trial in every)
    assert [trial.name for trial in trials("defaults")] == list(GRID)
    assert {trial.builder for trial in trials("search")} == {"search"}
    asked = build_arguments(Trial("candidates", {"times_top_k": 1.5}), top_k=4)
    assert asked == {"builder": "candidates", "num_candidates": 6}
    assert build_arguments(Trial("search", {"noise": 0.6}), top_k=4) == {"builder": "search"}


def test_a_record_replaces_that_of_its_trial_and_commit():
    known = [record(), record(seed=1), record(commit="0000000")]
    found = merged(known, record(tokens_worse=0.034))
    assert [(one["seed"], one["commit"], one["tokens_worse"]) for one in found] == [
        (1, "abc1234", 0.012),
        (0, "0000000", 0.012),
        (0, "abc1234", 0.034),
    ]


def test_the_page_has_a_table_for_each_group():
    page = report([record(), record(seed=1, tokens_worse=0.034)])
    assert "## olmoe, topics, seed 1 (512 reference tokens, 2 windows of each text, commit abc1234)" in page
    assert "| topk | 4.000 -> 2.000 | 3.4 | 50 | -0.1000 [-0.2000, +0.0000] |" in page and "| 10.00 |" in page


@pytest.mark.slow
def test_the_sweep_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "GRID", {"topk": [{"builder_steps": 2}], "search": [{"noise": 0.6}]})
    builders.main(["--tokens", "512", "--held-out", "2", "--results", str(tmp_path)])
    found = json.loads((tmp_path / "builders.json").read_text())
    assert [one["trial"] for one in found] == ["topk, builder_steps 2", "search, noise 0.6"]
    assert all(one["nll_after"] < one["nll_before"] for one in found)
    assert "| search, noise 0.6 |" in (tmp_path / "builders.md").read_text()
