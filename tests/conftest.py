"""Settings of every test run: one thread each, no network, a cache folder of its own; and the fixtures that all share.

Workers of pytest-xdist read this file as well, so each has its own cache folder. A plain `pytest` is one process.
"""

import gc
import os
import shutil
import tempfile

# before torch is imported: tiny tensors gain nothing from threads, and those of several workers wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KNNMOE_CACHE"] = tempfile.mkdtemp(prefix="knnmoe-tests-")  # never the user's own
# modules of `evaluate` and `datasets`: read when these are imported, and one process can import from one folder alone
os.environ["HF_MODULES_CACHE"] = os.path.join(os.environ["KNNMOE_CACHE"], "modules")

import pytest
import torch

from tests.support.hub.fixture import hub
from tests.support.models import FAMILIES, PLAIN, random_memory, tiny_model

__all__ = ["FAMILIES", "PLAIN", "hub", "random_memory", "tiny_model"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One for each core that this process may use, as far as memory goes: a worker takes about 1 GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, 8)


def pytest_collection_finish() -> None:
    """Takes what was imported out of garbage collection: `Trainer.train` collects, which took half of a tiny build."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
    shutil.rmtree(os.environ["KNNMOE_CACHE"], ignore_errors=True)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return tiny_model(family)


@pytest.fixture
def tokens() -> torch.Tensor:
    """(3, 12) token ids."""
    return torch.randint(96, (3, 12), generator=torch.Generator().manual_seed(2))
