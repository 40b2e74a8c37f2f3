"""Where a fused kernel can be had; Triton is neither required nor imported unless there is a GPU for it."""

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from knnmoe_hf.search.packed import packed

logger = logging.getLogger(__name__)

FUSED_GROUP = 32
"""Rows that share a minimum."""

Minima = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of asked (T, c), codes (N, c) and half_norms (N,): `reference_minima`."""


@functools.cache
def fused_minima(device: torch.device, dtype: torch.dtype) -> Minima | None:
    """
    The kernel for keys of a dtype, if it works here.

    Args:
        device: where the keys are; there is a kernel for CUDA alone.
        dtype: of the keys.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    try:
        from knnmoe_hf.search.triton_search import group_minima

        with torch.cuda.device(device):
            works = is_right(group_minima, device, dtype)
    except Exception as error:  # of a compiler, a driver: whatever it is, there is another way
        logger.warning("No fused search on %s, torch's products instead: %s", device, error)
        return None
    if not works:
        logger.warning("No fused search on %s, torch's products instead: its scores are wrong.", device)
    return group_minima if works else None


def is_right(minima: Minima, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel agrees with torch on a few keys."""
    codes = (torch.arange(170 * 50) * 37 % 97 - 48).view(170, 50).to(device, dtype)  # the last group is not whole
    asked = (torch.arange(2 * 50) * 23 % 31 - 15.0).view(2, 50).to(device)
    half_norms = codes.float().square().sum(-1) / 2
    found, wanted = (of(asked, codes, half_norms) for of in (minima, reference_minima))
    return torch.equal(found, wanted)  # every sum is of halves, and none is rounded


def reference_minima(asked: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    """
    What the kernel computes, by torch.

    Returns:
        (T, N // FUSED_GROUP) int64, the least score of each group of successive rows, packed with its first row.
    """
    scores = half_norms - (codes.float() * asked[:, None]).sum(dim=-1)  # (T, N)
    groups = len(codes) // FUSED_GROUP
    least = scores[:, : groups * FUSED_GROUP].unflatten(1, (groups, FUSED_GROUP)).amin(dim=-1)
    return packed(least, FUSED_GROUP * torch.arange(groups, device=asked.device))
