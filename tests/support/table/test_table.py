"""Every cell of the support table: with a memory, each way of running gives what plain passes with the memory give."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.table.cells import CELLS, COMPILED, MAIN, REGULAR
from tests.support.table.check import WithoutMemory, check
from tests.support.table.ways import IN_PROCESSES, WAYS

ROOT = Path(__file__).parents[3]


def parameters(ways, quick):
    for (family, way), reason in CELLS.items():
        if way in ways:
            marks = [] if quick(family, way) else [pytest.mark.slow]
            if family not in (COMPILED if way == "torch.compile" else REGULAR) and marks:
                marks.append(pytest.mark.support_table)
            if reason is not None:
                marks.append(pytest.mark.xfail(reason=reason, raises=WithoutMemory, strict=True))
            yield pytest.param(family, way, marks=marks, id=f"{family}, {way}")


@pytest.fixture
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would collect it, slowly
    yield
    torch._dynamo.reset()


def is_quick(family, way):
    # compiling takes seconds; test_compile.py beside this folder does it in the default run
    return WAYS[way].quick or (family in MAIN and way != "torch.compile")


@pytest.mark.parametrize("family, way", parameters(WAYS, is_quick))
def test_a_model_with_a_memory_gives_what_plain_passes_give(family, way, tmp_path, fresh_compiler):
    check(family, WAYS[way], tmp_path)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, list]]:
    """What each of two processes found, for all families at once, as starting them takes the most time."""
    folder = tmp_path_factory.mktemp("processes")
    words = [sys.executable, "-m", "tests.support.table.in_processes", str(folder)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{index}.json").read_text()) for index in (0, 1)]


@pytest.mark.parametrize("family, way", parameters(IN_PROCESSES, lambda family, way: False))
def test_a_model_in_two_processes_gives_what_plain_passes_give(family, way, outcomes):
    for found in outcomes:
        kind, message = found[f"{family}, {way}"]
        if kind == "WithoutMemory":
            raise WithoutMemory(message)
        assert kind is None, f"{kind}: {message}"
