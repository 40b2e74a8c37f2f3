"""What was compiled for each kind of processor."""

import pytest
import torch

from knnmoe_hf import native

LEVELS = {"AVX512": "_x86_64_v4", "AVX2": "_x86_64_v3", "DEFAULT": "_portable"}


def use_build_for(level: str, monkeypatch) -> None:
    """The build for such a processor is used from here on, where this one can run it."""
    here = torch.backends.cpu.get_cpu_capability()
    names = list(LEVELS)
    if names.index(level) < (names.index(here) if here in LEVELS else len(LEVELS) - 1):
        pytest.skip(f"this processor has no {level}")
    build = native.load(level)
    if level == "AVX512" and not torch.cpu.get_capabilities().get("avx512_vnni"):
        pytest.skip("this processor has no AVX512 VNNI")
    assert build.__name__.endswith(LEVELS[level]), f"the build for {level} is not there"
    monkeypatch.setattr(native, "kernels", build)
