"""The benchmarks of search, of long memories and of loading: they run, and their figures mean what the tables say."""

import io
import json
import sys

import pytest
from transformers import OlmoeConfig

from benchmarks import loading, long_memories, search_engines
from knnmoe_hf.memory.size import PUBLISHED


def test_the_benchmark_of_search_runs(tmp_path):
    sizes = ["--rows", "300", "600", "--dims", "8", "16", "--batches", "1", "16", "--engines", "torch", "hnsw"]
    search_engines.main(
        [*sizes, "--references", "64", "--queries", "32", "--seconds", "0", "--results", str(tmp_path)]
    )
    found = json.loads((tmp_path / "search_engines.json").read_text())
    assert [(one["dims"], one["rows"], one["engine"]) for one in found["settings"]] == [
        (dims, rows, engine) for dims in (8, 16) for rows in (300, 600) for engine in ("torch", "hnsw")
    ]
    assert all(one["recall"] == 1.0 for one in found["settings"] if one["engine"] == "torch")
    assert all(one["fits"]["batch 16 with rows"] is not None for one in found["growth"])
    table = (tmp_path / "search_engines.md").read_text()
    assert sum(line.startswith(("| torch |", "| hnsw |")) for line in table.splitlines()) == 8 + 2


@pytest.fixture
def small(monkeypatch):
    """Sizes at which a memory is saved and attached in a moment."""
    sizes = dict(hidden_size=64, num_attention_heads=4, num_experts=8, num_experts_per_tok=2)
    monkeypatch.setitem(PUBLISHED, loading.MODEL, OlmoeConfig(**sizes))


def test_the_benchmark_of_long_memories_runs(tmp_path, small):
    long_memories.main(["--rows", "300", "2500", "--layers", "2", "--turns", "2", "--results", str(tmp_path)])
    found = json.loads((tmp_path / "long_memories.json").read_text())["microseconds"]
    assert all(len(found[name][rows]) == 2 for name in ("decode", "prefill") for rows in ("300", "2500"))
    table = (tmp_path / "long_memories.md").read_text()
    assert "| decode | 300 |" in table and "| 1.00 [1.00, 1.00] |" in table and "| prefill | 2,500 |" in table


def test_an_opening_maps_the_files_and_attaching_reads_them(tmp_path, small):
    size = loading.save_memory(loading.small_model(2), 20_000, tmp_path / "memory")
    told = loading.opened(str(tmp_path / "memory"), attach=2, engine="torch", wait=False)
    assert told["rows"] == 20_000 and told["seconds"] > 0 and told["attach_seconds"] > 0
    assert told["mapped"] <= told["attach_mapped"] <= size + 2**20
    assert told["attach_mapped"] > 2 * 20_000 * 48  # the keys of both layers


def test_one_who_waits_has_read_every_page(tmp_path, small, monkeypatch, capsys):
    size = loading.save_memory(loading.small_model(1), 20_000, tmp_path / "memory")
    looked = []

    class Parent(io.StringIO):
        def readline(self, *_):
            looked.append(loading.mapped())
            return "\n"

    monkeypatch.setattr(sys, "stdin", Parent())
    loading.opened(str(tmp_path / "memory"), attach=0, engine="torch", wait=True)
    assert looked[0]["Rss"] == pytest.approx(size, abs=2**16) and capsys.readouterr().out == "open\n"


@pytest.mark.slow
def test_the_benchmark_of_loading_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "PARTS", (0.5, 1.0))  # every size starts six processes
    sizes = ["--gigabytes", "0.001", "--layers", "1", "--attach-rows", "8000"]
    loading.main([*sizes, "--folder", str(tmp_path), "--results", str(tmp_path)])
    found = json.loads((tmp_path / "loading.json").read_text())
    assert [one["rows"] <= 8000 for one in found["settings"]] == [True, False]
    assert ["attached" in one for one in found["settings"]] == [True, False]
    for one in found["settings"]:
        told = (one["first"], *one["later"], one.get("attached", one["first"]))
        assert {one["rows"]} == {opened["rows"] for opened in told}
    alone, *both = found["settings"][-1]["shared"]
    assert alone["Pss"] > 1.5 * both[0]["Pss"]
    assert (tmp_path / "loading.md").read_text().count("\n| ") >= 2 + 3
