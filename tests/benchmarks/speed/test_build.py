"""What the benchmark of building makes of its runs, and that it runs."""

import json

import pytest
import torch

from benchmarks.pages import provenance
from benchmarks.speed.build import main, report_processes, same_bytes


def content(digests: list[str]) -> dict:
    runs = [
        {"processes": 1 + index % 2, "build": s, "optimising": 10.0, "cpu": 0.9 * s, "rows": 7, "digest": digest}
        for index, (s, digest) in enumerate(zip((20.0, 11.0, 30.0, 15.0), digests))
    ]
    return {"made": provenance("benchmarks.speed.build", []), "runs": runs}


def test_ratios_are_of_neighbours_and_bytes_are_compared():
    text = report_processes(content(["a"] * 4))
    assert "| 1 | 25.0 [20.0, 30.0] | 10.0 [10.0, 10.0] | 15.0 [10.0, 20.0] | 22.5 [18.0, 27.0] |" in text
    assert "Ratio of the times 0.525 [0.500, 0.550]" in text and "the same bytes" in text
    other = content(["a", "a", "a", "b"])
    assert "OTHER BYTES" in report_processes(other) and not same_bytes(other["runs"])


@pytest.fixture
def threads():
    """Restores torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_the_benchmark_of_builders_runs(tmp_path, threads):
    main(["--batches", "1", "--repeats", "1", "--steps", "2", "--results", str(tmp_path)])
    records = json.loads((tmp_path / "build_time.json").read_text())["records"]
    assert [record["builder"] for record in records] == ["candidates", "topk", "search"]
    assert [list(record["passes"].values()) for record in records] == [[2, 2], [2, 2], [3, 0]]
    assert all(record["times_passes"][0] > 0 for record in records)
    assert (tmp_path / "build_time.md").read_text().count("\n| olmoe |") == 3


@pytest.mark.slow
def test_the_benchmark_of_processes_runs(tmp_path, threads):
    main(["--processes", "2", "--references", "4", "--repeats", "1", "--results", str(tmp_path)])
    runs = json.loads((tmp_path / "build_processes.json").read_text())["runs"]
    assert [run["processes"] for run in runs] == [1, 2] and same_bytes(runs)
