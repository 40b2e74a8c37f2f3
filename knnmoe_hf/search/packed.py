"""Scores and places in one integer, so that equal scores leave nothing to an algorithm's whim."""

import torch
from torch import Tensor


def packed(scores: Tensor, places: Tensor) -> Tensor:
    """int64 that are in order as (score, place) are; scores float32, places from 0 to 2**32 - 1."""
    bits = scores.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # of negative floats the larger bits are the smaller
    return (ordered.long() << 32) | places


def places_of(numbers: Tensor) -> Tensor:
    """int64, the places that were packed."""
    return numbers & 0xFFFFFFFF
