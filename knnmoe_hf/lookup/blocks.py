"""Tables of rows that may be larger than memory: read block by block, through the same few methods as a tensor."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

BLOCK = 1024
"""Rows of a table that are in memory at once."""


class Table(Protocol):
    """N rows of numbers; a tensor (N, width) is one."""

    @property
    def shape(self) -> Sequence[int]:
        """N and width."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Tensor:
        """(n, width), some rows in their order."""


def blocks(table: Table, size: int = BLOCK) -> Iterator[Tensor]:
    """The rows of a table in their order, as tensors (<= size, width) float32 on the host."""
    for start in range(0, len(table), size):
        yield table[start : start + size].detach().to("cpu", torch.float32)


def picked(table: Table, rows: Tensor, size: int = BLOCK) -> Iterator[Tensor]:
    """The rows at these ascending indices (n,), as tensors (<= size, width) float32 on the host."""
    for start in range(0, len(table), size):
        some = rows[(rows >= start) & (rows < start + size)]
        if len(some):
            yield table[start : start + size].detach().to("cpu", torch.float32)[some - start]


def all_finite(tensor: Tensor, size: int = BLOCK) -> bool:
    """Whether no value is infinite or NaN; looked at in blocks of rows, so that a mask of all values never exists."""
    return not tensor.is_floating_point() or all(bool(block.isfinite().all()) for block in tensor.split(size))


LARGEST = 1e30
"""No stored number is larger: sums of products of a few such numbers are still finite in float32."""


class Bounds(NamedTuple):
    """
    What the numbers of a stored tensor can be.

    Attributes:
        low, high: the least and the largest.
        distinct: whether no two numbers of a row are equal.
    """

    low: float
    high: float
    distinct: bool = False


def outside(tensor: Tensor, bounds: Bounds | None = None, size: int = BLOCK) -> str | None:
    """
    What is wrong with the numbers of a stored tensor, as the end of "it has ..."; None if nothing is.

    Args:
        bounds: by default, those of floats are plus and minus `LARGEST`, and integers have none.
    """
    if bounds is None:
        bounds = Bounds(-LARGEST, LARGEST) if tensor.is_floating_point() else Bounds(-math.inf, math.inf)
    kind = "values" if tensor.is_floating_point() else "indices"
    for block in tensor.split(size):
        if not block.numel():
            continue
        low, high = (one.item() for one in block.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            return "values that are not finite"
        if low < bounds.low or high > bounds.high:
            return f"{kind} that are not from {bounds.low} to {bounds.high}"
        if bounds.distinct and bool((block.sort(dim=-1).values.diff(dim=-1) == 0).any()):
            return f"{kind} that stand twice in a row"
    return None


class Derived:
    """A table whose rows are computed from those of another table when they are read."""

    def __init__(self, table: Table, width: int, function: Callable[[Tensor], Tensor]):
        self.table, self.function = table, function
        self.shape = (len(table), width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.function(self.table[rows])


Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes an uninitialised tensor of a shape and dtype, in memory or on disk."""


def in_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An `Allocate` in memory."""
    return torch.empty(tuple(shape), dtype=dtype)
