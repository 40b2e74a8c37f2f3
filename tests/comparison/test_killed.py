"""A process that runs a comparison is killed at several moments; the next one goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from knnmoe_hf.comparison.run import RESULTS
from tests.comparison.helpers import timeless, write_tasks

ROOT = Path(__file__).parent.parent.parent


def started(folder: Path, output: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "tests.comparison.compare_in_process", str(folder), str(output)]
    return subprocess.Popen(words, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)


def written(output: Path) -> int:
    """Bytes of all records."""
    return sum(path.stat().st_size for path in (output / "responses").rglob("*.jsonl"))


@pytest.mark.slow
def test_a_killed_comparison_ends_as_one_that_was_never_interrupted(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_tasks(folder)
    assert started(folder, tmp_path / "whole").wait() == 0
    total, kills = written(tmp_path / "whole"), []
    for share in (0.05, 0.35, 0.6, 0.9):
        process = started(folder, tmp_path / "killed")
        while process.poll() is None and written(tmp_path / "killed") < share * total:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        kills.append(process.wait())
    assert -signal.SIGKILL in kills  # a quick process may have ended before the last one
    assert started(folder, tmp_path / "killed").wait() == 0
    whole, killed = (json.loads((tmp_path / name / RESULTS).read_text()) for name in ("whole", "killed"))
    assert killed["complete"] and timeless(killed) == timeless(whole)
