"""A lookup's search as one operator, which compilers need not trace: most engines branch on what they find."""

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

from knnmoe_hf.search.base import SearchEngine


class HasEngine(Protocol):
    """What can be searched under a handle; it is not kept alive."""

    engine: SearchEngine


_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, HasEngine] = weakref.WeakValueDictionary()


def handle_of(lookup: HasEngine) -> int:
    """A new number that stands for the lookup in compiled graphs."""
    handle = next(_handles)
    _by_handle[handle] = lookup
    return handle


@torch.library.custom_op("knnmoe_hf::search", mutates_args=())
def opaque_search(queries: Tensor, handle: int, k: int) -> tuple[Tensor, Tensor]:
    """Distances and rows of the k nearest rows of each query, see `SearchEngine.search`."""
    found = _by_handle[handle].engine.search(queries, k)
    return found.distances.contiguous(), found.rows.contiguous()


@opaque_search.register_fake
def _(queries: Tensor, handle: int, k: int) -> tuple[Tensor, Tensor]:
    return queries.new_empty(len(queries), k, dtype=torch.float32), queries.new_empty(len(queries), k).long()
