"""A process that is killed in the middle of a push or a pull: what was sent is not sent again, and nothing is half."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from knnmoe_hf import RoutingMemory
from knnmoe_hf.memory.levels import at_level
from tests.memory.helpers import assert_same, full_memory
from tests.support.models import tiny_model

ROOT = Path(__file__).parents[2]
# a test run that was started in the background ignores Ctrl-C, and its children would too
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
PUSH = "from knnmoe_hf import RoutingMemory as M; M.from_pretrained({0!r}).push_to_hub('memory', max_shard_size='4KB')"
PULL = "from knnmoe_hf import RoutingMemory as M; print(len(M.from_pretrained('me/memory')))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("memory")
    full_memory(tiny_model("olmoe")).save_pretrained(place)
    return place


def start(code: str, hub) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HEARS + code],
        cwd=ROOT,
        env=os.environ | hub.environment,
        stdout=-1,
        stderr=-1,
        text=True,
    )


def kill_when(process: subprocess.Popen, happened, by: signal.Signals) -> None:
    end = time.monotonic() + 120
    while not happened() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    process.send_signal(by)
    process.wait(30)  # also after Ctrl-C: it does not wait for the rest of the files
    assert process.returncode not in (0, None)


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_push_that_was_killed_goes_on_in_another_process(folder, hub, by):
    memory = RoutingMemory.from_pretrained(folder)
    sent = lambda: [line for line in hub.requests if line.startswith("PUT /lfs/")]  # noqa: E731
    slow = hub.faults.slow(500, pattern="PUT /lfs/", skip=2)
    process = start(PUSH.format(str(folder)), hub)
    kill_when(process, lambda: len(sent()) >= 2 and slow.skip == 0, by)
    assert hub.files("me/memory") == {}
    hub.faults.clear()
    before = len(sent())
    said = start(PUSH.format(str(folder)), hub).communicate(timeout=120)
    assert_same(RoutingMemory.from_pretrained("me/memory"), at_level(memory, "ids"))
    assert before >= 2 and len(sent()) == len({*sent()}), said  # no object twice
    assert len(hub.commits("me/memory")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_that_was_killed_goes_on_in_another_process(folder, hub, by):
    memory = RoutingMemory.from_pretrained(folder)
    memory.push_to_hub("memory", max_shard_size="4KB")
    got = lambda: [line for line in hub.requests if line.startswith("GET /cdn/")]  # noqa: E731
    hub.faults.slow(500, pattern="GET /cdn/", skip=2)
    kill_when(start(PULL, hub), lambda: len(got()) >= 3, by)
    hub.faults.clear()
    out, err = start(PULL, hub).communicate(timeout=120)
    assert out.split() == ["40"], err
    whole = got()[:2]
    assert len(got()) == len(hub.store.objects) + 1 and all(got().count(line) == 1 for line in whole)
