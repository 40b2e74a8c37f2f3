"""`Processes`: which process does which part, how all get the results, and that a single one needs no group."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from knnmoe_hf.distributed import Processes

ROOT = Path(__file__).parents[1]


def test_a_process_that_works_alone_needs_no_group():
    alone = Processes()
    tensor = torch.arange(3)
    alone.broadcast(tensor, 0)
    assert tensor.tolist() == [0, 1, 2]
    assert alone.gather("x") == ["x"] and alone.map(iter("abc"), str.upper) == ["A", "B", "C"]


LAST = """
import atexit, os, time

def threads():
    time.sleep(0.2)  # one that has ended is listed for a moment
    return len(os.listdir("/proc/self/task"))

atexit.register(lambda: print(during - before, during - threads()))  # the first to be registered is called last
from torch import distributed as dist
from knnmoe_hf.distributed import Processes

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
before, processes = threads(), Processes(0, 2)
during = threads()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
def test_the_threads_of_a_group_end_before_the_interpreter():
    done = subprocess.run([sys.executable, "-c", LAST], cwd=ROOT, capture_output=True, text=True, timeout=120)
    began, ended = map(int, done.stdout.split())
    assert done.returncode == 0 and began == ended > 0, done.stderr[-4000:]


class Together(Processes):
    """Processes that are threads of this one."""

    def __init__(self, index: int, values: list, barrier: threading.Barrier):
        super().__init__()
        self.index, self.count = index, len(values)
        self.values, self.barrier = values, barrier

    def gather(self, value):
        self.values[self.index] = value
        self.barrier.wait(timeout=60)
        return list(self.values)


@pytest.mark.parametrize("items", [0, 1, 3, 7])
def test_items_are_shared_out_in_turn_and_all_get_the_results_in_their_order(items):
    count, done = 3, []
    values, barrier = [None] * count, threading.Barrier(count)

    def map_in(index: int) -> list:
        processes = Together(index, values, barrier)

        def work(item: int) -> int:
            done.append((item, index, processes.owner(item)))
            return 10 * item

        return processes.map(iter(range(items)), work)

    with ThreadPoolExecutor(count) as threads:
        results = list(threads.map(map_in, range(count)))
    assert results == [[10 * item for item in range(items)]] * count
    assert sorted(done) == [(item, item % count, item % count) for item in range(items)]  # each once, by its owner
