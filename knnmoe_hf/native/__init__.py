"""
The compiled part: on a processor, queries, their nearest keys, and what tokens recall.

Between two lookups a model's weights go through all caches, so that every operation begins by waiting for its own
code: a step of decoding takes ten times as long in PyTorch as in one call of compiled code. What is here says again,
to rounding, what `KeyEncoder`, `mixing`, `ValueTable` and `Recurrence` say for any device.
"""

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch._C import _functorch
from torch.autograd import forward_ad

logger = logging.getLogger(__name__)
Found = TypeVar("Found")


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
"""Whether that is a build with a processor's wide vectors, of which its speed comes."""


def on(device: torch.device) -> ModuleType | None:
    """What was compiled, for tensors on this device."""
    return kernels if device.type == "cpu" else None


def kinds() -> dict[torch.dtype, Any]:
    """What a gate's input and logits may be, by the names that the compiled part has for it."""
    return {getattr(torch, name): kind for name, kind in kernels.Kind.__members__.items()}


def plain(*tensors: Tensor) -> bool:
    """
    Whether tensors are no more than their numbers, so that compiled code may read them.

    Inside a transform of `torch.func` a tensor has no storage, and one that was made just now neither; where forward
    mode differentiates, it may have a tangent, of which compiled code knows nothing.
    """
    for tensor in tensors:
        if type(tensor) is not Tensor:
            return False
    return forward_ad._current_level < 0 and not _transforms_active()


def of_numbers(function: Callable[[Tensor], Found], tensor: Tensor) -> Found:
    """
    What a function gives for the numbers of a detached tensor, with no transform of `torch.func` at work.

    Raises:
        NotImplementedError: for a tensor that `torch.func.vmap` makes of several.
    """
    if torch.compiler.is_compiling() or not _transforms_active():
        return function(tensor)
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            raise NotImplementedError(
                "torch.func.vmap over what a memory's rows are searched for is not supported: map over rows of one "
                "batch instead (input_ids), or inside disable_memory."
            )
        tensor = _functorch.get_unwrapped(tensor)
    with torch._C._DisableFuncTorch():
        return function(tensor)
