"""
Native code for the CPU: encoding queries, searching keys, combining values, mixing next tokens.

Between two lookups the model's weights pass through every cache, so that each PyTorch operation begins with cache
misses of its own code. One native call replaces dozens of operations and takes a tenth of their time. What is here
gives the results of `KeyEncoder`, `IvfSearch`, `ValueTable` and `knnmoe_hf.lookup.logits` within rounding, on
contiguous tensors on the CPU.

The module that `load` returns has (T tokens, N rows, c key dimensions, E experts, V outputs):

- `Kind`: an enum of the dtypes of gate inputs and outputs of a model, `float32`, `float16` and `bfloat16`.
- `Index(codes, step=None)`: keys (N, c), with `set_lists`, `set_scan` and `bytes`;
  `search(queries, count, k, distances, rows, threads)`.
- `Encoder(weight, bias, width, hidden)`: `encode(x, count, kind, queries, threads)`.
- `ValueTable(codes, experts, default_value, step, offset, num_experts)`:
  `combine(rows, weights, count, k, values, threads)`.
- `mix_next_tokens(outputs, count, columns, kind, width, factor, cap, distances, rows, voters, confidences, confidence,
  next_tokens, num_rows, unit, scale, weight, fitted, threads)`: into outputs (T, V) of a model's output embeddings,
  in place; `knnmoe_hf.lookup.logits`.

Tensors of these methods are passed as addresses, which `address` gives. A token gets the same result alone and
in a batch, to the bit.
"""

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

logger = logging.getLogger(__name__)

BUILDS = {"AVX512": "x86_64_v3", "AVX2": "x86_64_v3"}
"""The build for each value of `torch.backends.cpu.get_cpu_capability()`; `portable` for any other."""


def load(capability: str) -> ModuleType | None:
    """
    The build for a processor.

    Args:
        capability: as `torch.backends.cpu.get_cpu_capability()` names it.

    Returns:
        The module; the portable one where the better one was not compiled; None, with a warning, where neither was.
    """
    for build in dict.fromkeys((BUILDS.get(capability, "portable"), "portable")):
        try:
            return importlib.import_module(f"{__name__}._{build}")
        except ImportError:
            continue
    logger.warning(
        "knnmoe_hf was installed without its native code, so that lookups on a CPU take several times as long: "
        "install it again where there is a C++ compiler (gcc or clang)"
    )
    return None


kernels = load(torch.backends.cpu.get_cpu_capability())
"""The build for this processor; None if there is none, and lookups run in PyTorch."""

fast = kernels is not None and not kernels.__name__.endswith("portable")
"""Whether `kernels` uses this processor's SIMD instructions, from which its speed comes."""


def on(device: torch.device) -> ModuleType | None:
    """`kernels` if tensors are on the CPU, else None."""
    return kernels if device.type == "cpu" else None


def kinds() -> dict[torch.dtype, Any]:
    """The member of `Kind` for each dtype that native code reads from a model."""
    return _kinds_of(kernels)


@functools.cache
def _kinds_of(module: ModuleType) -> dict[torch.dtype, Any]:
    return {getattr(torch, name): kind for name, kind in module.Kind.__members__.items()}


# PyTorch has no public names for these two; where they are missing, no transform is assumed to be active
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def in_transform() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active in this thread."""
    return getattr(forward_ad, "_current_level", -1) >= 0 or _functorch_active()


def is_plain(*tensors: Tensor) -> bool:
    """
    Whether tensors are nothing but their numbers, so that native code may read them.

    False for subclasses of `torch.Tensor`, and inside transforms, where tensors have no storage or have tangents.
    """
    for tensor in tensors:  # a loop takes half the time of all(), and this runs for each token in each layer
        if type(tensor) is not Tensor:
            return False
    return not in_transform()


def address(tensor: Tensor, dtype: torch.dtype) -> int:
    """
    The address of a tensor's first number, for native code.

    Raises:
        TypeError: unless the tensor is on the CPU, contiguous and of this dtype.
    """
    if not (tensor.is_cpu and tensor.dtype is dtype and tensor.is_contiguous()):
        layout = "contiguous" if tensor.is_contiguous() else "non-contiguous"
        raise TypeError(
            f"native code cannot read a {layout} {tensor.dtype} tensor on {tensor.device}: "
            f"pass a contiguous {dtype} tensor on the CPU."
        )
    return tensor.data_ptr()
