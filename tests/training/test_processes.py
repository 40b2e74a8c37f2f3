"""A build in two processes gives the same bytes as in one, and both processes have the memory at the end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from knnmoe_hf.training.checks import check_launch
from tests.training.build_in_processes import CASES

ROOT = Path(__file__).parents[2]
_MEASURED = ("_runtime", "_per_second")


def launch(folder: Path, *cases: str) -> dict[int, Path]:
    """Folders of the cases, built in one process and in two, of one thread each; by the number of processes."""
    words = [sys.executable, "-m", "tests.training.build_in_processes", str(folder), *cases]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return {count: folder / f"from-{count}" for count in (1, 2)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[int, Path]:
    return launch(tmp_path_factory.mktemp("built"), *CASES)


@pytest.fixture(params=CASES)
def case(request, built) -> dict[int, Path]:
    return {count: folder / request.param for count, folder in built.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def found(folder: Path, index: int = 0) -> dict:
    return json.loads((folder / f"found-{index}.json").read_text())


def untimed(metrics: dict) -> dict:
    """Without measurements of time."""
    return {name: value for name, value in metrics.items() if not name.endswith(_MEASURED)}


def check_same_bytes(case: dict[int, Path]) -> None:
    alone = contents(case[1] / "by-0")
    assert {"config.json", "README.md"} < set(alone) and any(name.endswith(".safetensors") for name in alone)
    assert contents(case[2] / "by-0") == alone
    for folder, index in ((case[1], 0), (case[2], 0), (case[2], 1)):
        assert contents(folder / f"of-{index}") == contents(case[1] / "of-0")


def check_same_scores_of_streams(case: dict[int, Path]) -> None:
    """No example counts twice, and batches of one step may differ in length."""
    alone = found(case[1])
    for index in (0, 1):
        one = found(case[2], index)
        for count, wanted in alone["streamed"].items():
            assert untimed(one["streamed"][count]) == pytest.approx(untimed(wanted), abs=1e-5), count
        assert len(one["predicted"]) == 5
        assert one["predicted"] == pytest.approx(alone["predicted"], abs=1e-3)


def test_a_build_in_two_processes_gives_both_the_bytes_of_a_build_in_one(tmp_path):
    """The only case that is not marked slow."""
    folders = launch(tmp_path, "unlike")
    case = {count: folder / "unlike" for count, folder in folders.items()}
    check_same_bytes(case)
    check_same_scores_of_streams(case)


@pytest.mark.slow
def test_one_and_two_processes_write_the_same_bytes(case):
    check_same_bytes(case)


@pytest.mark.slow
def test_each_process_has_the_memory_in_force_and_only_the_first_one_saves_it(case):
    assert not (case[2] / "by-1").exists()
    assert found(case[2], 0)["active"] == found(case[2], 1)["active"] == "default"


@pytest.mark.slow
def test_no_file_of_rows_is_left_behind_but_checkpoints(case):
    for folder in case.values():
        assert all(path.name.startswith("checkpoint-") for path in (folder / "out").glob("*"))


@pytest.mark.slow
def test_each_process_reports_the_metrics_of_a_single_one(case):
    alone, both = found(case[1]), [found(case[2], index) for index in (0, 1)]
    for one in both:
        assert untimed(one["metrics"]) == untimed(alone["metrics"])
        assert (one["loss"], one["calibration"]) == (alone["loss"], alone["calibration"])
        rows = [logs["nll_before"] for logs in one["logs"] if "nll_before" in logs]
        assert rows == [logs["nll_before"] for logs in both[0]["logs"] if "nll_before" in logs]
        for count, wanted in alone["evaluated"].items():
            for name, value in untimed(wanted).items():
                assert one["evaluated"][count][name] == pytest.approx(value, abs=1e-5), (count, name)


@pytest.mark.slow
def test_the_cases_cover_what_they_are_meant_to(built):
    assert found(built[1] / "calibrated")["calibration"].startswith("CalibrationRecord(threshold=")
    assert [found(built[1] / name)["metrics"]["rows"] for name in CASES] == [21 * 23, 21 * 23, 3 * 29 + 3 * 8, 23]


@pytest.mark.parametrize("cut", ["fsdp", "deepspeed", "tp", "cp", "sp"])
def test_a_model_that_is_split_over_processes_is_refused(cut):
    sizes = {f"get_{name}_size": lambda own=2 if name == cut else 1: own for name in ("tp", "cp", "sp")}
    trainer = SimpleNamespace(is_fsdp_enabled=cut == "fsdp", is_deepspeed_enabled=cut == "deepspeed", **sizes)
    trainer.args = SimpleNamespace(world_size=1)
    with pytest.raises(ValueError, match="splits the model over processes.*device_map in one process"):
        check_launch(trainer)
