"""Opening memories: what is measured is what the table says, and the benchmark runs."""

import gc
import io
import json
import sys

import pytest
from transformers import OlmoeConfig

from benchmarks.speed import loading
from knnmoe_hf.memory.size import PUBLISHED


@pytest.fixture
def small(monkeypatch):
    """Sizes at which a memory is saved and attached in a moment."""
    sizes = dict(hidden_size=64, num_attention_heads=4, num_experts=8, num_experts_per_tok=2)
    monkeypatch.setitem(PUBLISHED, loading.MODEL, OlmoeConfig(**sizes))


def test_an_opening_maps_the_files_and_attaching_reads_them(tmp_path, small):
    size = loading.save_memory(loading.small_model(2), 20_000, tmp_path / "memory")
    found = loading.opened(str(tmp_path / "memory"), attach=2, engine="torch", wait=False)
    assert found["rows"] == 20_000 and found["seconds"] > 0 and found["attach_seconds"] > 0
    assert found["mapped"] <= found["attach_mapped"] <= size + 2**20
    assert found["attach_mapped"] > 2 * 20_000 * 48  # the keys of both layers


def test_one_who_waits_has_read_every_page(tmp_path, small, monkeypatch, capsys):
    size = loading.save_memory(loading.small_model(1), 20_000, tmp_path / "memory")
    gc.collect()  # memories that other tests opened
    before, looked = loading.mapped()["Rss"], []

    class Parent(io.StringIO):
        def readline(self, *_):
            looked.append(loading.mapped())
            return "\n"

    monkeypatch.setattr(sys, "stdin", Parent())
    loading.opened(str(tmp_path / "memory"), attach=0, engine="torch", wait=True)
    assert looked[0]["Rss"] - before == pytest.approx(size, abs=2**16) and capsys.readouterr().out == "open\n"


@pytest.mark.slow
def test_the_benchmark_of_loading_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "PARTS", (1.0,))  # each size starts seven processes
    sizes = ["--gigabytes", "0.001", "--layers", "1"]
    loading.main([*sizes, "--folder", str(tmp_path), "--results", str(tmp_path)])
    (found,) = json.loads((tmp_path / "loading.json").read_text())["settings"]
    openings = (found["first"], *found["later"], found["attached"], found["attached_again"])
    assert {found["rows"]} == {opening["rows"] for opening in openings}
    alone, *both = found["shared"]
    assert alone["Pss"] > 1.5 * both[0]["Pss"]
    page = (tmp_path / "loading.md").read_text()
    assert f"| {found['rows']:,} | 1 |" in page and "| attaching | one point |" in page
