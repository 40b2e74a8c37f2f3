"""Scores and their minima over groups of rows in one pass: the score matrix is never written.

Imported only where there is Triton and a GPU (`knnmoe_hf.search.fused`). Tested in Triton's interpreter and
compiled for two generations of GPUs; it has not run on one yet, so its constants are not tuned.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from knnmoe_hf.search.fused import FUSED_GROUP

_GROUPS = 4  # of one program
_CHUNK = 16  # dimensions that a thread reads at once, of int8 in one load, so that no sum crosses threads


@triton.jit
def _group_minima(
    asked, codes, half_norms, minima, groups,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    row = tl.program_id(0) * GROUPS * GROUP + tl.arange(0, GROUPS * GROUP)
    inside = row < groups * GROUP
    where = row.to(tl.int64) * WIDTH
    score = tl.load(half_norms + row, mask=inside, other=0.0)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        there = column < WIDTH
        query = tl.load(asked + token * WIDTH + column, mask=there, other=0.0)
        key = tl.load(codes + where[:, None] + column[None, :], mask=inside[:, None] & there[None, :], other=0)
        score -= tl.sum(key.to(tl.float32) * query[None, :], axis=1)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    bits = tl.min(tl.reshape(score, (GROUPS, GROUP)), axis=1).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)  # as `packed` does it
    tl.store(minima + token.to(tl.int64) * groups + group, (ordered << 32) | (group * GROUP), mask=group < groups)


def _launch(asked: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    tokens, width = asked.shape
    groups = len(codes) // FUSED_GROUP
    minima = torch.empty(tokens, groups, dtype=torch.int64, device=asked.device)
    if not tokens:
        return minima  # there is no empty grid
    with torch.cuda.device_of(asked):  # which need not be the current one
        _group_minima[(triton.cdiv(groups, _GROUPS), tokens)](
            asked.contiguous(), codes, half_norms, minima, groups,
            WIDTH=width, CHUNK=_CHUNK, GROUP=FUSED_GROUP, GROUPS=_GROUPS,
        )  # fmt: skip
    return minima


@torch.library.custom_op("knnmoe_hf::group_minima", mutates_args=())
def _opaque_launch(asked: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    """As one operator: not every compiler can look into every version of Triton."""
    return _launch(asked, codes, half_norms)


@_opaque_launch.register_fake
def _(asked: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    return asked.new_empty(asked.shape[0], codes.shape[0] // FUSED_GROUP, dtype=torch.int64)


def group_minima(asked: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    """
    Least scores `half_norm - asked . code` of groups of `FUSED_GROUP` successive rows.

    Each score is summed in the same order whatever is asked beside it.

    Args:
        asked: (T, c) float32.
        codes: (N, c) int8 or floats, contiguous.
        half_norms: (N,) float32.

    Returns:
        (T, N // FUSED_GROUP) int64, packed with each group's first row (`knnmoe_hf.search.packed`); rows behind the
        last whole group are left out.
    """
    launch = _opaque_launch if torch.compiler.is_compiling() else _launch  # the operator costs some time of its own
    return launch(asked, codes, half_norms)
