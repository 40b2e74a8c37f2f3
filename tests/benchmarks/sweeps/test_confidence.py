"""The sweep of the confidences: its text, its memories and its page."""

import json

import pytest
import torch

from benchmarks import texts as module
from benchmarks.sweeps import confidence
from benchmarks.sweeps.confidence import SETTINGS, measured, nll, read, report, with_stats
from benchmarks.texts import WINDOW, LabTexts
from knnmoe_hf.lookup.options import CONFIDENCES
from tests.support.models import random_memory, tiny_model
from tests.support.stats import with_stats as calibrated
from tests.support.tokenizers import byte_tokenizer


def test_every_confidence_is_swept():
    assert {setting["confidence"] for setting in SETTINGS.values()} == set(CONFIDENCES)


def test_windows_that_change_in_the_middle_are_halves_of_both_kinds(monkeypatch):
    def documents(kind: str, split: str) -> list[str]:
        return [f"{kind} {split} {i} ".ljust(WINDOW - 1, "abcdefgh"[i % 8]) for i in range(100)]  # a window each

    monkeypatch.setattr(module, "documents", documents)
    found, half = read("topics", LabTexts(byte_tokenizer()), count=4), WINDOW // 2
    assert [name for name in found if name.startswith("off: ")] == [
        "off: headers",
        "off: notices",
        "off: python",
        "off: tables",
    ]
    assert torch.equal(found["in then off"][:, :half], found["in"][:, :half])
    assert torch.equal(found["off then in"][:, half:], found["in"][:, :half])
    mixed = found["off then in"][:, :half]
    assert torch.equal(mixed, found["in then off"][:, half:])
    assert [bool((row == found["off: headers"][0, :half]).all()) for row in mixed] == [True, False, False, False]


def test_changes_are_against_the_model_without_a_memory_and_by_place():
    model = tiny_model("olmoe", max_position_embeddings=512)
    tokens = {"in": torch.randint(96, (2, WINDOW), generator=torch.Generator().manual_seed(0))}
    base = {name: nll(model, rows) for name, rows in tokens.items()}
    found = measured(model, random_memory(model), tokens, base)
    assert set(found) == {"in", "in 1-16", "in 17-64", "in 65-256"} and found["in"] != 0
    parts = 16 * found["in 1-16"] + 48 * found["in 17-64"] + 191 * found["in 65-256"]
    assert parts / 255 == pytest.approx(found["in"], abs=1e-5)
    assert torch.equal(nll(model, tokens["in"]), base["in"])  # detached


def test_constants_of_the_calibration_are_replaced_in_a_copy():
    model = tiny_model("olmoe")
    memory = calibrated(random_memory(model, confidence="calibrated"))
    changed = with_stats(memory, threshold=0.77)
    assert {rows.stats.threshold for rows in changed.layers.values()} == {0.77}
    assert 0.77 not in {rows.stats.threshold for rows in memory.layers.values()}


def test_the_page_has_a_table_for_each_run():
    page = report({"olmoe, topics (commit abc1234, `run`)": {"rbf": {"in": -0.1, "off": 0.02}}})
    assert "## olmoe, topics (commit abc1234, `run`)" in page and "| rbf | -0.1000 | +0.0200 |" in page


@pytest.mark.slow
def test_the_sweep_runs(tmp_path, monkeypatch):
    names = ("rbf, gamma 1", "context, half-life 8.0", "calibrated", "calibrated, width 0.1")
    monkeypatch.setattr(confidence, "SETTINGS", {name: SETTINGS[name] for name in names})
    confidence.main(["--labs", "olmoe", "--windows", "2", "--references", "12", "--results", str(tmp_path)])
    (found,) = json.loads((tmp_path / "confidence.json").read_text()).values()
    assert list(found) == list(names) and found["rbf, gamma 1"]["in"] < 0
