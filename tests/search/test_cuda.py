"""The fused kernel as far as it can be tested without a GPU, and what happens where it fails."""

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

from knnmoe_hf.search import cuda
from knnmoe_hf.search.cuda import checked_group_minima, is_right, reference_minima
from tests.search.helpers import DTYPES, engine, random


@pytest.fixture(autouse=True)
def checked_again():
    checked_group_minima.cache_clear()
    yield
    checked_group_minima.cache_clear()


def output_of(module: str, **environment: str) -> str:
    command = [sys.executable, "-m", f"tests.search.{module}"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_kernel_finds_what_torch_finds_in_the_interpreter():
    assert output_of("interpreted_kernel", TRITON_INTERPRET="1") == "as torch\n"


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_here_and_reads_whole_vectors(tmp_path):
    assert output_of("compiled_kernel", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) == "compiled\n"


def test_the_cpu_has_none():
    assert engine(random(50, 4)).group_minima is None


def test_a_kernel_that_fails_or_is_wrong_is_not_used_and_one_warning_says_so(monkeypatch, caplog):
    def failing(*args):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for kernel, text in ((failing, "no driver"), (lambda *args: reference_minima(*args) - 1, "wrong scores")):
        monkeypatch.setattr(cuda, "group_minima", kernel)
        checked_group_minima.cache_clear()
        caplog.clear()
        for _ in range(2):
            assert checked_group_minima(torch.device("cpu"), torch.int8) is None
        assert caplog.text.count("torch's product is used instead") == 1 and text in caplog.text
    monkeypatch.setattr(cuda, "group_minima", reference_minima)
    checked_group_minima.cache_clear()
    assert checked_group_minima(torch.device("cpu"), torch.int8) is reference_minima


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_scores_are_noticed(dtype):
    device = torch.device("cpu")
    assert is_right(reference_minima, device, dtype)
    assert not is_right(lambda *given: reference_minima(*given) + 2**32, device, dtype)
    assert not is_right(lambda *given: reference_minima(*given).roll(1, dims=1), device, dtype)
    assert not is_right(lambda *given: reference_minima(*given) - 1, device, dtype)
    assert not is_right(lambda scaled, codes, norms: reference_minima(scaled, -codes, norms), device, dtype)


def test_triton_is_looked_for_on_cuda_only(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail("looked for"))
    engine(random(50, 4))
