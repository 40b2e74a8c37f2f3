"""Numbers of a cache's tokens, kept beside it: they follow the cache through its own methods, as running sums do."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from knnmoe_hf.models.predecessors import cached_length

_ATTRIBUTE = "knnmoe_token_numbers"
UNKNOWN = -2
"""The number of a token that nobody numbered."""


def numbers_beside(cache: Cache | None, rows: int, slots: int) -> Tensor:
    """
    The numbers of a cache's tokens.

    Args:
        cache: None is an empty one.
        rows, slots: B, and how many slots are filled.

    Returns:
        (B, slots) int64; `UNKNOWN` for tokens that nobody numbered, all of them if the cache was made by other code.
    """
    found = getattr(cache, _ATTRIBUTE, None)
    if not isinstance(found, Tensor) or len(found) != rows:
        return torch.full((rows, slots), UNKNOWN)
    missing = slots - found.shape[1]
    # what nobody numbered was added after the last number, by calls that were not watched
    return torch.nn.functional.pad(found[:, :slots], (0, max(missing, 0)), value=UNKNOWN)


def keep_numbers(cache: Cache, numbers: Tensor) -> None:
    """Keeps the numbers (B, slots) int64 of all tokens that a cache holds."""
    setattr(cache, _ATTRIBUTE, numbers)


def take_numbers(cache: Cache) -> Tensor | None:
    """Removes the numbers from beside a cache and returns them; None if there are none."""
    return vars(cache).pop(_ATTRIBUTE, None)


def follow_method(cache: Cache, numbers: Tensor, name: str, args: Sequence) -> None:
    """Keeps the numbers that a cache had before a method of this name was called with these arguments."""
    if name == "reset":
        return
    if name == "crop":
        numbers = numbers[:, : int(cached_length(cache))]
    elif name == "batch_repeat_interleave":
        numbers = numbers.repeat_interleave(args[0], dim=0)
    else:
        numbers = numbers[torch.as_tensor(args[0], device=numbers.device)]
    keep_numbers(cache, numbers)
