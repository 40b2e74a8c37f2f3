"""Mutated memories: none of them crashes, hangs, takes much memory, reaches out of its folder or changes the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory.fuzz.opening import MORE_BYTES

ROOT = Path(__file__).parents[3]


def opened(folder: Path, seed: int, count: int) -> dict:
    """How many of these mutated memories were opened, and how many were refused, in a process of its own."""
    folder.mkdir()
    command = [sys.executable, "-m", "tests.memory.fuzz.opening", str(seed), str(count), str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert not result["bad"], "\n".join(result["bad"])
    assert sum(result["found"].values()) == count and result["grown"] < MORE_BYTES / 4
    return result["found"]


def test_some_mutated_memories(tmp_path):
    found = opened(tmp_path / "place", 19, 200)
    assert found["refused"] > 80 and found["opened"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_thousand_mutated_memories(tmp_path, seed):
    found = opened(tmp_path / "place", seed, 10_240)
    assert found["refused"] > 4000 and found["opened"] > 1000
