"""The fused kernel, as far as it can be tested without a GPU; and what happens where it fails or is not there."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from knnmoe_hf.search.fused import fused_minima, is_right, reference_minima

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def asked_anew():
    fused_minima.cache_clear()
    yield
    fused_minima.cache_clear()


def output_of(module: str, **environment: str) -> str:
    command = [sys.executable, "-m", f"tests.search.{module}"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@with_triton
def test_the_kernel_finds_what_torch_finds_in_the_interpreter():
    assert output_of("interpreted", TRITON_INTERPRET="1") == "as torch\n"


@with_triton
def test_the_kernel_compiles_for_gpus_that_are_not_here_and_reads_whole_vectors(tmp_path):
    assert output_of("compiled", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) == "compiled\n"


def test_there_is_none_on_the_cpu_nor_without_triton(monkeypatch):
    assert fused_minima(torch.device("cpu"), torch.int8) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fused_minima(GPU, torch.int8) is None


def test_a_kernel_that_does_not_run_is_not_used_and_one_is_told_so(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "knnmoe_hf.search.triton_search", None)  # importing it fails
    assert fused_minima(GPU, torch.int8) is None
    assert fused_minima(GPU, torch.int8) is None
    assert caplog.text.count("torch's products instead") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_wrong_scores_are_noticed(dtype):
    device = torch.device("cpu")
    assert is_right(reference_minima, device, dtype)
    assert not is_right(lambda *given: reference_minima(*given) + 2**32, device, dtype)
    assert not is_right(lambda *given: reference_minima(*given).roll(1, dims=1), device, dtype)
    assert not is_right(lambda *given: reference_minima(*given) - 1, device, dtype)
    assert not is_right(lambda asked, codes, norms: reference_minima(asked, -codes, norms), device, dtype)
