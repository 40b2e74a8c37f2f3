"""A build keeps its rows on disk: more rows take no more RAM, and no files are left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from tests.support.models import tiny_model
from tests.support.training import build

ROOT = Path(__file__).parents[2]
STORED = {
    "raw": {"confidence": "context", "search_backend": "torch"},  # an index would take memory for each row
    "pca": {
        "confidence": "context",
        "search_backend": "torch",
        "key_codec": "pca",
        "key_dtype": "int8",
        "value_dtype": "int8",
    },
}


def measured(folder: Path, count: int, options: dict) -> dict[str, int]:
    # a fixed threshold gives freed blocks back to the system at once, so that only what is in use is counted
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    words = [sys.executable, "-m", "tests.training.measure_build", str(folder), str(count), json.dumps(options)]
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("stored", STORED)
def test_four_times_the_references_take_no_more_ram(tmp_path, stored):
    few, many = (measured(tmp_path, count, STORED[stored]) for count in (30, 120))
    assert many["taken"] - few["taken"] < 0.1 * (many["rows"] - few["rows"])


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("stopped")


@pytest.mark.parametrize("broken", [False, True])
def test_a_build_without_checkpoints_leaves_nothing_in_its_folder_whether_it_ends_well_or_not(tmp_path, broken):
    if broken:
        with pytest.raises(RuntimeError, match="stopped"):
            build(tiny_model("olmoe"), tmp_path, trainer={"callbacks": [Stops()]}, save_strategy="no")
    else:
        build(tiny_model("olmoe"), tmp_path, save_strategy="no")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_memory_outlives_its_trainer_and_can_be_saved_twice(tmp_path):
    memory = build(tiny_model("olmoe"), tmp_path)
    for name in ("one", "two"):
        memory.save_pretrained(tmp_path / name)
    assert [path.read_bytes() for path in sorted((tmp_path / "one").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "two").iterdir())
    ]
