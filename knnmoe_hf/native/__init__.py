"""
The compiled part: on a processor, the nearest keys of queries, and what one token recalls.

Between two lookups a model's weights go through all caches, so that every operation begins by waiting for its own
code: a step of decoding takes ten times as long in PyTorch as in one call of compiled code. What is here says again,
to rounding, what `KeyEncoder`, `mixing` and `ValueTable` say for any device.
"""

import importlib
import logging
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

_LEVELS = {"AVX512": ("x86_64_v4", "x86_64_v3"), "AVX2": ("x86_64_v3",)}  # by PyTorch's name of what a processor has


def load(capability: str) -> ModuleType | None:
    """The build for a processor that PyTorch calls so, or the next best; None if none was made."""
    for level in (*_LEVELS.get(capability, ()), "portable"):
        try:
            return importlib.import_module(f"{__name__}._{level}")
        except ImportError:
            continue
    logger.warning(
        "the compiled part of knnmoe_hf is not there, so that lookups on a CPU take several times as long: install "
        "it where there is a C++ compiler (gcc or clang)"
    )
    return None


kernels = load(torch.backends.cpu.get_cpu_capability())
"""`Index` and `Step` (see module.cpp), or None where they were not compiled: then everything runs in PyTorch."""

KINDS = {getattr(torch, name): kind for name, kind in kernels.Kind.__members__.items()} if kernels else {}
"""What a gate's input may be."""
