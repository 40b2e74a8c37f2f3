"""The builds of the native code, for tests that run on each of them."""

import warnings

import pytest
import torch

from knnmoe_hf import native

BUILDS = {"AVX2": "_x86_64_v3", "DEFAULT": "_portable"}
"""Module of each build, by what PyTorch calls a processor that it is made for."""

_RUNS = {"AVX512": ("AVX2", "DEFAULT"), "AVX2": ("AVX2", "DEFAULT")}  # on a processor of a capability


def use_build_for(build: str, monkeypatch) -> None:
    """Makes the library use a build; skips with a warning in pytest's summary if this processor cannot run it."""
    here = torch.backends.cpu.get_cpu_capability()
    if build not in _RUNS.get(here, ("DEFAULT",)):
        message = f"NOT TESTED: the native build {BUILDS[build]} cannot run on this processor ({here})"
        warnings.warn(message, stacklevel=2)
        pytest.skip(message)
    kernels = native.load(build)
    assert kernels is not None and kernels.__name__.endswith(BUILDS[build]), f"{BUILDS[build]} was not compiled"
    monkeypatch.setattr(native, "kernels", kernels)
