"""
Hashes of runs of tokens, by which text is found again in any chunking.

The hashes are part of a saved memory's format: they depend on the token ids alone, on any machine.
"""

import torch
from torch import Tensor

NGRAM = 8  # tokens
KEPT = 4  # a memory that is saved without text keeps one hash in so many
_BITS = 64


def ngram_hashes(ids: Tensor, length: int = NGRAM) -> Tensor:
    """
    A hash of every run of `length` tokens of one example.

    Args:
        ids: (S,) token ids, integers.
        length: tokens of a run, at most `NGRAM`.

    Returns:
        (max(S - length + 1, 0),) int64, in the order of the runs.
    """
    ids = ids.long()
    count = max(len(ids) - length + 1, 0)
    hashes = torch.full((count,), _CONSTANTS[-length], dtype=torch.int64, device=ids.device)
    for place in range(length):
        hashes += (ids[place : place + count] + 1) * _CONSTANTS[place]  # wraps around, as do all products here
    return _mixed(hashes)


def example_hashes(token_ids: Tensor, offsets: Tensor, length: int = NGRAM) -> tuple[Tensor, Tensor]:
    """
    `ngram_hashes` of many examples at once, none across a border.

    Args:
        token_ids: (T,) the tokens of one example after the other.
        offsets: (X + 1,) int64, where each example begins in `token_ids`, and T.
        length: tokens of a run, at most `NGRAM`.

    Returns:
        (G,) int64 hashes of one example after the other, and (X + 1,) int64, where each example's begin, and G.
    """
    counts = (offsets.diff() - length + 1).clamp_min(0)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    moved = torch.repeat_interleave(offsets[:-1] - bounds[:-1], counts)
    return ngram_hashes(token_ids, length)[torch.arange(len(moved)) + moved], bounds


def is_kept(hashes: Tensor) -> Tensor:
    """Which hashes a memory keeps that is saved without text: (G,) bool, about a quarter, chosen by their value."""
    return hashes.remainder(KEPT) == 0


def kept_hashes(hashes: Tensor) -> Tensor:
    """
    The hashes that a memory keeps that is saved without text, in their order; the same run is kept in every text.

    Only a quarter, so that text is hard to put together again from guesses of its runs.
    """
    return hashes[is_kept(hashes)]


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned number."""
    value &= 2**_BITS - 1
    return value - 2**_BITS if value >> (_BITS - 1) else value


def _mixed(hashes: Tensor) -> Tensor:
    """Every bit of the result depends on every bit given (the finalizer of SplitMix64), in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes ^= (hashes >> shift) & (2 ** (_BITS - shift) - 1)  # the mask, as >> repeats the sign
        hashes *= _signed(factor)
    hashes ^= (hashes >> 31) & (2**33 - 1)
    return hashes


_STEP = 0x9E3779B97F4A7C15
_CONSTANTS = (_mixed(torch.tensor([_signed(_STEP * i) for i in range(1, 2 * NGRAM + 1)])) | 1).tolist()
"""Odd numbers without a pattern: the first `NGRAM` for the places of a run, the others for its length."""
