"""A process that runs a comparison is killed at several moments; the next one goes on where it was."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from knnmoe_hf.comparison.run import RESULTS
from tests.comparison.helpers import compared, timeless, write_tasks
from tests.support.interrupts import interrupted

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


FITTED = [
    {"method": "knn_moe", "build": {"builder_steps": 1}},
    {"method": "constant_bias", "epochs": 1, "examples_per_step": 4, "learning_rates": [0.3]},
    {"method": "router_only", "epochs": 1, "examples_per_step": 4, "learning_rates": [0.01]},
    {"method": "roma", "epochs": 2, "examples_per_step": 4, "learning_rates": [0.01], "lambdas": [1.0]},
    {"method": "lora", "epochs": 1, "examples_per_step": 4, "learning_rates": [0.01]},
]
MOMENTS = [
    "KNNMoETrainer.training_step",  # of the build of a memory
    "calibrate_prepared",
    "write_folder",
    "_step:2",  # of the constant bias
    "_step:2",  # of router-only
    "_Manifold.distance:3",  # RoMA
    "_NextTokenTrainer.compute_loss:2",  # LoRA
    "Method.save",
]


def run_and_die(folder: Path, output: Path, moment: str | None) -> None:
    """A comparison of which this process kills itself at a call of a function; None runs it to its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    with nullcontext() if moment is None else interrupted(moment, number=signal.SIGKILL):
        compared(folder, output, FITTED, [{"name": "small"}], references=12, limit=2)


@pytest.mark.slow
def test_a_comparison_that_is_killed_within_each_fit_ends_as_one_that_was_never_interrupted(tmp_path):
    """One after the other in one folder, so that each run finds what those before it left."""
    folder, output = tmp_path / "tasks", tmp_path / "killed"
    folder.mkdir()
    write_tasks(folder)
    processes = multiprocessing.get_context("forkserver")  # which imports everything once
    processes.set_forkserver_preload([__name__])

    def code_of(*arguments) -> int:
        process = processes.Process(target=run_and_die, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    assert code_of(folder, tmp_path / "whole", None) == 0
    for moment in MOMENTS:
        assert code_of(folder, output, moment) == -signal.SIGKILL, moment
        whole = [place for place in (output / "fits").glob("*/*") if not place.name.startswith(".")]
        assert all((place / "fit.json").exists() for place in whole)
    assert code_of(folder, output, None) == 0
    whole, killed = (json.loads((tmp_path / name / RESULTS).read_text()) for name in ("whole", "killed"))
    assert killed["complete"] and timeless(killed) == timeless(whole)
    assert {row["status"] for row in killed["results"]} == {"done"}
    assert [path.name for path in output.rglob(".*")] == [".lock"]
