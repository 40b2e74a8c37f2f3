"""`knnmoe build` that was interrupted: what it says, what goes on with `--resume`, what is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from knnmoe_hf.cli import main
from tests.cli.helpers import QUICK, one_error, texts
from tests.cli.test_interrupts import run

LINES = [f"the gate number {n} routes a token to expert {n % 7}" for n in range(12)]
SMALL = ["--batch-size", "2", "--save-steps", "2"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".cache"}


@pytest.fixture(scope="module")
def words(base, tmp_path_factory) -> list[str]:
    dataset = texts(tmp_path_factory.mktemp("lines") / "x.jsonl", LINES)
    return ["build", "--model", str(base), "--dataset", dataset, *QUICK, *SMALL]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "memory"
    assert main([*words, "--output", str(folder)]) == 0
    return contents(folder)


@pytest.fixture(scope="module")
def interrupted(words, tmp_path_factory) -> Path:
    """Output folder of a build that Ctrl-C ended in its fourth batch of six."""
    folder = tmp_path_factory.mktemp("interrupted") / "memory"
    found = run([*words, "--output", str(folder)], "call:KNNMoETrainer.training_step", count=4)
    assert found.returncode == 130 and found.stderr.endswith("knnmoe: interrupted\n")
    assert "checkpoint-3 has the 3 batches that were solved: go on with" in found.stderr
    assert "on the command line with --resume" in found.stderr and "Traceback" not in found.stderr
    return folder


def test_a_finished_build_leaves_no_checkpoint(whole):
    assert "config.json" in whole and not any("checkpoint" in name for name in whole)


def test_an_interrupted_build_is_refused_and_then_goes_on(words, interrupted, whole, capsys):
    before = sorted(interrupted.iterdir())
    assert main([*words, "--output", str(interrupted)]) == 1
    said = one_error(capsys.readouterr(), "build")
    assert "unfinished build (checkpoint-3): go on with it with --resume" in said and "--overwrite" in said
    other = texts(interrupted.parent / "other.jsonl", ["something else", *LINES[1:]])
    changed = [other if word.endswith("x.jsonl") else word for word in words]
    assert main([*changed, "--output", str(interrupted), "--resume"]) == 1
    assert "checkpoint-3 is of other data" in one_error(capsys.readouterr(), "build")
    assert sorted(interrupted.iterdir()) == before
    assert main([*words, "--output", str(interrupted), "--resume"]) == 0
    assert contents(interrupted) == whole


def test_overwrite_begins_anew_and_resume_without_a_checkpoint_begins(words, whole, tmp_path, capsys):
    found = run([*words, "--output", str(tmp_path / "m")], "call:KNNMoETrainer.training_step", count=4)
    assert found.returncode == 130
    assert main([*words, "--output", str(tmp_path / "m"), "--overwrite", "--save-strategy", "no"]) == 0
    assert contents(tmp_path / "m") == whole
    assert main([*words, "--output", str(tmp_path / "n"), "--resume"]) == 0
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert contents(tmp_path / "n") == whole


@pytest.mark.parametrize("too_large", ["tokenizer", "rows", "memory"])
def test_a_full_disk_is_told_in_one_sentence_and_the_build_goes_on(words, whole, tmp_path, capsys, too_large):
    resource = pytest.importorskip("resource")  # a limit on the size of files is met like a full disk
    largest = max(len(data) for name, data in whole.items() if name.endswith(".safetensors"))
    limit = {"tokenizer": 100, "rows": len(whole["tokenizer.json"]) + 1, "memory": largest - 1}[too_large]
    folder, (soft, hard) = tmp_path / "memory", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert main([*words, "--output", str(folder)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = one_error(capsys.readouterr(), "build")
    assert said.startswith("there is no space left for ") and "free some, " in said and said.endswith(".")
    assert ("with --resume" in said) == (too_large == "memory") and not (folder / "config.json").exists()
    assert main([*words, "--output", str(folder), "--resume"]) == 0
    assert contents(folder) == whole


@pytest.mark.slow
@pytest.mark.parametrize("after", ["checkpoint-2", "checkpoint-6", "config.json"])
def test_a_build_that_is_killed_goes_on(words, whole, tmp_path, after):
    folder = tmp_path / "memory"
    command = [sys.executable, "-m", "knnmoe_hf", *words, "--output", str(folder)]
    one = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / after).exists() and one.poll() is None:
        time.sleep(0.001)
    os.kill(one.pid, signal.SIGKILL)
    one.wait()
    assert main([*words, "--output", str(folder), "--resume"]) == 0
    assert contents(folder) == whole
