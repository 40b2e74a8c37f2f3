"""
The compiled part: on a processor, queries, their nearest keys, and what tokens recall.

Between two lookups a model's weights go through all caches, so that every operation begins by waiting for its own
code: a step of decoding takes ten times as long in PyTorch as in two calls of compiled code. What is here says again,
to rounding, what `KeyEncoder`, `mixing`, `ValueTable` and `Recurrence` say for any device.
"""

import importlib
import logging
from types import ModuleType
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)


class Index(Protocol):
    """Keys that compiled code may read, with or without lists (see module.hpp)."""


class Recalled(Protocol):
    """What one token recalls: how similar its neighbours are in the mean, and their mixed values (E,)."""

    similar: float

    def copy(self, into: int) -> None:
        """Writes the values, float32, to an address."""


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
"""With `Index`, `Recall`, `Kind` and `running_sums` (see module.hpp); None if not compiled, and PyTorch does it."""

fast = kernels is not None and not kernels.__name__.endswith("portable")
"""Whether that is a build with a processor's wide vectors, from which its speed comes."""


def on(device: torch.device) -> ModuleType | None:
    """What was compiled, for tensors on this device."""
    return kernels if device.type == "cpu" else None


def kinds() -> dict[torch.dtype, Any]:
    """What a gate's input and logits may be, by the names that the compiled part has for it."""
    return {getattr(torch, name): kind for name, kind in kernels.Kind.__members__.items()}
