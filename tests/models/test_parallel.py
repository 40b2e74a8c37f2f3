"""Models that are split over two processes, or copied to them, compute with a memory what one process computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from knnmoe_hf import attach_memory
from tests.models.parallel_in_processes import WAYS, results
from tests.support.models import FAMILIES, random_memory, tiny_model

ROOT = Path(__file__).parents[2]
CUT = "FullyShardedDataParallel"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("parallel")
    words = [sys.executable, "-m", "tests.models.parallel_in_processes", str(folder)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"found-{index}.json").read_text()) for index in (0, 1)]


@pytest.fixture(scope="module", params=FAMILIES)
def alone(request) -> tuple[str, dict]:
    """A family, and what one process computes."""
    model = tiny_model(request.param)
    attach_memory(model, random_memory(model))
    return request.param, results(model)


def check_same(found: dict, wanted: dict, way: str) -> None:
    assert "error" not in found, found["error"]
    assert found["without"] == found.get("base", found["without"]) != found["with"]
    if "bfloat16" in way:  # rounds otherwise than any model in one process
        return
    for name in ("with", "without"):  # sums over processes are in another order
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(wanted[name]), atol=1e-4, rtol=0)
    assert found["generated"] == wanted["generated"]


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if way != CUT])
def test_a_memory_attaches_to_a_model_in_two_processes(found, alone, way):
    family, wanted = alone
    for one in found:
        check_same(one["after"][f"{family} {way}"], wanted, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if "_size" not in way])
def test_a_model_may_be_split_with_its_memory(found, alone, way):
    family, wanted = alone
    for one in found:
        check_same(one["before"][f"{family} {way}"], wanted, way)


@pytest.mark.slow
def test_gates_whose_weights_cannot_be_read_are_refused_with_the_way_out(found):
    for one in found:
        for family in FAMILIES:
            error = one["after"][f"{family} {CUT}"]["error"]
            assert error.startswith("UnsupportedModelError") and "attach the memory before wrapping" in error


@pytest.mark.slow
def test_a_build_of_a_split_model_is_refused(found):
    for one in found:
        for way, outcome in one["build"].items():
            assert outcome["error"].startswith("ValueError: the model's weights are split over processes"), way
