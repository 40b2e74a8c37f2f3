"""What the benchmark of several processes makes of its runs."""

import torch

from benchmarks.build_processes import alike, report
from benchmarks.measuring import hardware


def content(digests: list[str]) -> dict:
    runs = [
        {
            "processes": 1 + index % 2,
            "build": seconds,
            "solving": 10.0,
            "cpu": 0.9 * seconds,
            "rows": 7,
            "digest": digest,
        }
        for index, (seconds, digest) in enumerate(zip((20.0, 11.0, 30.0, 15.0), digests))
    ]
    return {"hardware": hardware(torch.device("cpu")), "runs": runs}


def test_ratios_are_of_neighbours_and_bytes_are_compared():
    text = report(content(["a"] * 4), 2)
    assert "| 1 | 25.0 [20.0, 30.0] | 10.0 [10.0, 10.0] | 15.0 [10.0, 20.0] | 22.5 [18.0, 27.0] |" in text
    assert "Ratio of the times 0.525 [0.500, 0.550]" in text and "the same bytes" in text
    other = content(["a", "a", "a", "b"])
    assert "OTHER BYTES" in report(other, 2) and not alike(other["runs"])
