"""
A fused Triton kernel for exact search on CUDA: scores and their minima in one pass, without a score matrix.

**Not yet run on a GPU.** It was tested in Triton's interpreter and compiled for two generations of GPUs; its constants
are not tuned. `TorchSearch` imports this module for keys on CUDA only, where Triton is installed.
"""

import functools
import logging
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from knnmoe_hf.search.exact import FUSED_GROUP
from knnmoe_hf.search.scores import packed

logger = logging.getLogger(__name__)

_GROUPS = 4  # of one program
_CHUNK = 16  # dimensions that a thread reads at once, int8 in one load, so that no sum crosses threads

GroupMinima = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function with the arguments and the result of `reference_minima`."""


@functools.cache
def checked_group_minima(device: torch.device, dtype: torch.dtype) -> GroupMinima | None:
    """
    The kernel for keys of a dtype on a CUDA device; None, with a warning, where it fails or gives wrong scores.
    """
    try:
        with torch.cuda.device(device):
            right = is_right(group_minima, device, dtype)
    except Exception as error:  # whatever a compiler or driver raises, torch's product does the work
        logger.warning("the fused search kernel fails on %s, torch's product is used instead: %s", device, error)
        return None
    if not right:
        logger.warning("the fused search kernel gives wrong scores on %s, torch's product is used instead", device)
    return group_minima if right else None


def is_right(minima: GroupMinima, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel gives the scores of `reference_minima` for a few keys whose sums need no rounding."""
    codes = (torch.arange(170 * 50) * 37 % 97 - 48).view(170, 50).to(device, dtype)  # the last group is not whole
    scaled = (torch.arange(2 * 50) * 23 % 31 - 15.0).view(2, 50).to(device)
    half_norms = codes.float().square().sum(-1) / 2
    return torch.equal(minima(scaled, codes, half_norms), reference_minima(scaled, codes, half_norms))


def reference_minima(scaled: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    """
    Least scores `half_norm - scaled . code` of groups of `FUSED_GROUP` successive rows, by torch.

    Args:
        scaled: (T, c) float32, queries times the keys' step.
        codes: (N, c) int8 or floats, contiguous.
        half_norms: (N,) float32.

    Returns:
        (T, N // FUSED_GROUP) int64, packed with each group's first row (`knnmoe_hf.search.scores.packed`); rows behind
        the last whole group are left out.
    """
    scores = half_norms - (codes.float() * scaled[:, None]).sum(dim=-1)  # (T, N)
    groups = len(codes) // FUSED_GROUP
    least = scores[:, : groups * FUSED_GROUP].unflatten(1, (groups, FUSED_GROUP)).amin(dim=-1)
    return packed(least, FUSED_GROUP * torch.arange(groups, device=scaled.device))


def group_minima(scaled: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    """`reference_minima` by the kernel; each score is summed in the same order in a batch of any size."""
    launch = _opaque_launch if torch.compiler.is_compiling() else _launch  # dispatching the operator takes time
    return launch(scaled, codes, half_norms)


@triton.jit
def _group_minima(
    scaled, codes, half_norms, minima, groups,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    row = tl.program_id(0) * GROUPS * GROUP + tl.arange(0, GROUPS * GROUP)
    inside = row < groups * GROUP
    offset = row.to(tl.int64) * WIDTH
    score = tl.load(half_norms + row, mask=inside, other=0.0)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        valid = column < WIDTH
        query = tl.load(scaled + token * WIDTH + column, mask=valid, other=0.0)
        key = tl.load(codes + offset[:, None] + column[None, :], mask=inside[:, None] & valid[None, :], other=0)
        score -= tl.sum(key.to(tl.float32) * query[None, :], axis=1)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    bits = tl.min(tl.reshape(score, (GROUPS, GROUP)), axis=1).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)  # as `packed` does
    tl.store(minima + token.to(tl.int64) * groups + group, (ordered << 32) | (group * GROUP), mask=group < groups)


def _launch(scaled: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    tokens, width = scaled.shape
    groups = len(codes) // FUSED_GROUP
    minima = torch.empty(tokens, groups, dtype=torch.int64, device=scaled.device)
    if not tokens:
        return minima  # a grid cannot be empty
    with torch.cuda.device_of(scaled):  # Triton launches on the current device
        _group_minima[(triton.cdiv(groups, _GROUPS), tokens)](
            scaled.contiguous(), codes, half_norms, minima, groups,
            WIDTH=width, CHUNK=_CHUNK, GROUP=FUSED_GROUP, GROUPS=_GROUPS,
        )  # fmt: skip
    return minima


@torch.library.custom_op("knnmoe_hf::group_minima", mutates_args=())
def _opaque_launch(scaled: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    """One operator for torch.compile, which cannot trace every version of Triton."""
    return _launch(scaled, codes, half_norms)


@_opaque_launch.register_fake
def _(scaled: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    return scaled.new_empty(scaled.shape[0], codes.shape[0] // FUSED_GROUP, dtype=torch.int64)
