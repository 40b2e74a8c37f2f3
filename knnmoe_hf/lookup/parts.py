"""Tables computed a part of their rows at a time, so that what is in between stays small."""

from collections.abc import Callable

import torch
from torch import Tensor

_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}  # float32 values of a temporary table: 1 MiB stays in a CPU's cache


def by_rows(function: Callable[..., Tensor], width: int, *tables: Tensor) -> Tensor:
    """
    A function of tables of T rows each, computed a part of the rows at a time, so that its temporary tables of `width`
    float32 values a row stay small. A compiler fuses them anyway, and would take the number of parts as fixed.
    """
    step = max(1, _AT_ONCE.get(tables[0].device.type, 2**22) // width)
    if is_traced() or len(tables[0]) <= step:
        return function(*tables)
    return torch.cat([function(*part) for part in zip(*(table.split(step) for table in tables))])


def is_traced() -> bool:
    """Whether this call is being recorded as a graph, in which a value must not decide what is computed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
