"""Which half-precision dtypes this machine's CPU multiplies fast, and a warning for a model that runs in another one.

Without the instructions for bfloat16, a CPU computes the same results slowly: forward and backward of the lab model
take about 2 (AVX-512) or 8 (AVX2) times as long as in float32, and 20 times were seen. With them, they take about as
long as in float32. The same holds for float16.
"""

import functools
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_CPUINFO = Path("/proc/cpuinfo")
# names in `torch.cpu.get_capabilities()` and, where they differ, in Linux's /proc/cpuinfo; x86 first, then Arm
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith", "asimdhp"),
}
# the answers of oneDNN, which multiplies the matrices: they follow ONEDNN_MAX_CPU_ISA, but are also yes where AVX-512
# emulates bfloat16, so that both answers are needed
_ONEDNN_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def is_fast_on_cpu(dtype: torch.dtype) -> bool:
    """
    Whether this machine's CPU multiplies matrices of this dtype about as fast as float32, or faster.

    False where it cannot be found out: float32 is then the safe choice.

    Args:
        dtype: a float dtype; only bfloat16 and float16 can be slow.
    """
    if dtype not in _INSTRUCTIONS:
        return True
    capabilities = _cpu_capabilities()
    return any(capabilities.get(name) for name in _INSTRUCTIONS[dtype]) and _onednn_supports(dtype)


def _cpu_capabilities() -> Mapping[str, Any]:
    """The CPU's instruction sets by name, from PyTorch or, before torch 2.10, from Linux; empty if unknown."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return {}
    found = (line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features")))
    return dict.fromkeys(next(found, "").split(), True)


def _onednn_supports(dtype: torch.dtype) -> bool:
    """Whether PyTorch's matrix library takes this dtype; builds without oneDNN, as for macOS, have plain loops."""
    try:
        return getattr(torch.ops.mkldnn, _ONEDNN_CHECKS[dtype])()
    except AttributeError:  # not a public operator: a later PyTorch may name it otherwise
        return torch.backends.mkldnn.is_available()


def warn_if_slow(model: nn.Module) -> None:
    """
    Warns, once per process, of a model that runs on the CPU in a dtype that the CPU is slow in.

    A model that is on an accelerator, wholly or in part, causes no warning: weights that accelerate offloads to the
    CPU are multiplied on the accelerator.
    """
    dtype = _main_dtype(model)
    if _runs_on_cpu(model) and not is_fast_on_cpu(dtype):
        _warn_once(str(dtype).removeprefix("torch."))


def _runs_on_cpu(model: nn.Module) -> bool:
    # parameters that accelerate offloads are on the meta device: its map says where they are, ints for accelerators
    places = (getattr(model, "hf_device_map", None) or {}).values()
    kinds = {str(place) for place in places} | {parameter.device.type for parameter in model.parameters()}
    return bool(kinds & {"cpu", "disk"}) and kinds <= {"cpu", "disk", "meta"}


def _main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of the model's float weights; norms or gates may be kept in another one."""
    sizes = Counter({torch.float32: 0})
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


@functools.cache  # once per process, with one model or many
def _warn_once(dtype: str) -> None:
    logger.warning(
        "the model runs in %s on a CPU without fast %s instructions, which takes several times as long as float32: "
        "load it with dtype=torch.float32",
        dtype,
        dtype,
    )
