"""Ctrl-C at any moment is one line and exit code 130; a reader that goes away is silence."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import QUICK, TEXTS, texts

SCRIPT = """
import os, signal, sys, time

where, count, times, then = {where!r}, {count!r}, {times!r}, {then!r}
first = os.getpid()


class Dying:
    def __del__(self):  # what is raised here is lost
        interrupt_now()


def interrupt():
    global count
    count -= 1
    if 0 >= count > -times:
        Dying() if {lost!r} else interrupt_now()


def again(frame, event, argument):  # Python forgets a profiler in which an exception is raised, but not a tracer
    global then
    if event == "call" and count <= 0 and frame.f_code.co_qualname == then:
        then = None
        interrupt_now()


def interrupt_now():
    (os.killpg if {group!r} else os.kill)(os.getpgrp() if {group!r} else os.getpid(), signal.SIGINT)


class Importing:
    def find_spec(self, name, path=None, target=None):
        if name == where:
            interrupt()


def calling(frame, event, argument):
    if event == "call" and frame.f_code.co_qualname == where:
        interrupt()


def waiting(frame, event, argument):  # so that worker processes end while the first process closes its bars
    name, seconds = ("tqdm.close", 3) if os.getpid() == first else ("Interrupts._handle", 2)
    if frame.f_code.co_qualname == name:
        time.sleep(seconds)


if ":" in where:
    where = where.partition(":")[2]
    sys.setprofile(calling)
else:
    sys.meta_path.insert(0, Importing())
if {slow!r} or then:
    sys.settrace(waiting if {slow!r} else again)
from knnmoe_hf.cli import main
code = main()
sys.settrace(None)
sys.exit(code if then is None else "there was no call of " + then)
"""


def run(words: list[str], where: str, **more):
    """A command in a process of its own, which is interrupted where a module is imported or a function is called."""
    code = SCRIPT.format(**dict(where=where, count=1, times=1, group=False, lost=False, slow=False, then=None) | more)
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, start_new_session=True, timeout=300
    )


@pytest.fixture(scope="module")
def words(base, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("interrupted")
    dataset = texts(folder / "x.jsonl", TEXTS)
    return [
        "build",
        "--model",
        str(base),
        "--dataset",
        dataset,
        "--output",
        str(folder / "memory"),
        *QUICK,
        "--overwrite",
    ]


def assert_interrupted(found, output: Path) -> None:
    assert found.returncode == 130, found.stderr
    assert re.search(r"(^|\n|\r)knnmoe: interrupted\n$", found.stderr) and "Traceback" not in found.stderr
    assert found.stderr.count("knnmoe: interrupted") == 1 and "error" not in found.stderr.lower()
    assert "Exception ignored" not in found.stderr and found.stdout == ""
    assert not (output / "config.json").exists()


@pytest.mark.parametrize(
    "where",
    [
        "knnmoe_hf.cli.command",  # before anything is parsed
        "knnmoe_hf.cli.build",
        "knnmoe_hf.training.options",
        "huggingface_hub.utils.logging",
        "transformers.utils.logging",
        "numpy._core.multiarray",  # which numpy turns into an ImportError
        "torch.autograd",
        "pyarrow.lib",
        "knnmoe_hf.training.trainer",
        pytest.param("call:PreTrainedModel.from_pretrained", marks=pytest.mark.slow),
        pytest.param("call:RowReader.read", marks=pytest.mark.slow),
        pytest.param("call:write_folder", marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_is_one_line(where, words):
    assert_interrupted(run(words, where), Path(words[words.index("--output") + 1]))


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_that_comes_where_nothing_can_be_raised_is_not_lost(times, words):
    found = run(words, "knnmoe_hf.training.trainer", times=times, lost=True)
    assert_interrupted(found, Path(words[words.index("--output") + 1]))


@pytest.mark.slow
@pytest.mark.parametrize("then", ["spoken", "Interrupts.said"])
def test_two_interrupts_in_a_row_are_one_line_below_the_bar(then, words):
    found = run([*words, "--batch-size", "1"], "call:KNNMoETrainer.training_step", count=2, then=then)
    assert_interrupted(found, Path(words[words.index("--output") + 1]))
    lines = found.stderr.split("\n")
    assert any("1/" in line for line in lines[:-2]) and lines[-2:] == ["knnmoe: interrupted", ""]


@pytest.mark.slow
@pytest.mark.parametrize("slow", [False, True])
def test_an_interrupt_reaches_worker_processes_without_a_word_of_theirs(slow, words):
    more = ["--batch-size", "1", "--dataloader-num-workers", "1"]
    found = run([*words, *more], "call:KNNMoETrainer.training_step", count=2, group=True, slow=slow)
    assert_interrupted(found, Path(words[words.index("--output") + 1]))


@pytest.mark.slow
def test_quiet_says_that_it_was_interrupted_all_the_same(words):
    found = run([*words, "--quiet"], "call:KNNMoETrainer.training_step")
    assert (found.returncode, found.stderr) == (130, "knnmoe: interrupted\n")


def piped(words: list[str], unbuffered: bool) -> subprocess.CompletedProcess:
    """A command whose output nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-m", "knnmoe_hf", *words]
        env = os.environ | {"PYTHONUNBUFFERED": "1" if unbuffered else ""}
        return subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    finally:
        os.close(write)


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_pipe_that_nobody_reads_is_silent(unbuffered, built):
    for words in (["--help"], ["build", "--help"], ["info", str(built)]):
        found = piped(words, unbuffered)
        # argparse ignores that a help text could not be written, unless it is still in the buffer
        assert found.stderr == "" and found.returncode in ((0, 141) if "--help" in words else (141,))


def test_a_name_that_stdout_has_no_letters_for_is_written_in_their_codes(built, tmp_path):
    (tmp_path / "gedächtnis").symlink_to(built)
    command = [sys.executable, "-m", "knnmoe_hf", "info", str(tmp_path / "gedächtnis")]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    found = subprocess.run(command, capture_output=True, text=True, env=env)
    assert found.returncode == 0 and found.stdout.startswith(f"{tmp_path}/ged\\xe4chtnis\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_a_full_disk_is_one_line(built):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "knnmoe_hf", "info", str(built)]
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 1
    assert re.fullmatch(r"knnmoe info: error: .*No space left on device\n", found.stderr)
