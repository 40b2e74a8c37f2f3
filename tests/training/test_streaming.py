"""A build keeps its rows on disk: it takes no more memory for more of them, and leaves nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from knnmoe_hf.lookup.blocks import Derived, blocks, in_memory, picked
from knnmoe_hf.training.row_files import DealtRows, RowFile, on_disk
from tests.support.models import tiny_model
from tests.support.training import build, examples

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
def test_four_times_the_references_take_no_more_memory(tmp_path, stored):
    few, many = (measured(tmp_path, count, STORED[stored]) for count in (30, 120))
    assert many["taken"] - few["taken"] < 0.1 * (many["rows"] - few["rows"])


@pytest.mark.parametrize("broken", [False, True])
def test_a_build_leaves_nothing_in_its_folder_whether_it_ends_well_or_not(tmp_path, broken):
    outside = {"input_ids": [1, 2, 96], "labels": [1, 2, 96]}  # of the vocabulary
    if broken:
        with pytest.raises(IndexError):
            build(tiny_model("olmoe"), tmp_path, rows=[*examples(2), outside])
    else:
        build(tiny_model("olmoe"), tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_memory_outlives_its_trainer_and_can_be_saved_twice(tmp_path):
    memory = build(tiny_model("olmoe"), tmp_path)
    for name in ("one", "two"):
        memory.save_pretrained(tmp_path / name)
    assert [path.read_bytes() for path in sorted((tmp_path / "one").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "two").iterdir())
    ]


# files of rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_rows_of_several_files_are_read_in_their_turns(tmp_path, dtype):
    rows = torch.randint(-9, 9, (23, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    turns = [(0, 5), (1, 4), (0, 0), (0, 7), (2, 0), (1, 7)]
    files, start = [RowFile(tmp_path) for _ in range(3)], 0
    for index, count in turns:
        files[index].append(rows[start : start + count])
        start += count
    table = DealtRows(files, turns)
    assert len(table) == 23 and table.shape == (23, 3)
    for part in (slice(None), slice(0, 1), slice(4, 6), slice(3, 17), slice(20, 99), slice(9, 9), slice(30, 40)):
        assert torch.equal(table[part], rows[part]) and table[part].dtype == dtype
    assert torch.equal(torch.cat(list(blocks(table, 4))), rows.float())
    some = torch.tensor([0, 3, 4, 11, 22])
    assert torch.equal(torch.cat(list(picked(table, some, 4))), rows[some].float())
    doubled = Derived(table, 3, lambda block: 2 * block)
    assert torch.equal(doubled[3:9], 2 * rows[3:9]) and doubled.shape == (23, 3)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_kind_are_refused(tmp_path):
    file = RowFile(tmp_path)
    file.append(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"rows of 4 torch.float32 follow such of 3 torch.float32\.$"):
        file.append(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="torch.float16 follow"):
        file.append(torch.zeros(2, 3, dtype=torch.float16))
    with pytest.raises(EOFError, match="2 were written"):
        file.read(1, torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(4, 3), (5,), (0, 3)])
def test_a_tensor_on_disk_is_a_tensor(tmp_path, shape):
    for allocate in (in_memory, on_disk(tmp_path)):
        tensor = allocate(shape, torch.float16)
        tensor.fill_(1.5)
        assert tensor.shape == shape and tensor.dtype == torch.float16 and bool((tensor == 1.5).all())
    assert list(tmp_path.iterdir()) == []
