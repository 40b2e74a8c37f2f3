"""Keys in four bits a number, list after list, by which compiled code chooses those that it reads."""

from typing import NamedTuple

import torch
from torch import Tensor

from knnmoe_hf.search.base import StoredKeys
from knnmoe_hf.search.lists import Lists

_TOGETHER = 16  # keys side by side: see sketch.hpp
_UNIT = 0.335  # of the standard deviation: the step of four bits that rounds normal numbers best (Max, 1960)
_BLOCK = 2**14


class Sketch(NamedTuple):
    """How far the keys of N rows in L lists are from their centroids, about: a quarter or an eighth of their bytes."""

    codes: Tensor  # (N / 16, 16 c / 2) uint8: of 16 rows, in the lists' order, two dimensions a byte, less 8
    units: Tensor  # (L,) float32, what a code of each list counts

    @classmethod
    def read(cls, index: dict[str, Tensor], keys: StoredKeys, lists: Lists) -> "Sketch":
        """
        The sketch among an engine's tensors.

        Raises:
            ValueError: if it is not of these keys in these lists.
        """
        sketch = cls(*(index[name] for name in cls._fields))
        shape = (-(-len(keys) // _TOGETHER), -(-keys.width // 2) * _TOGETHER)
        if sketch.codes.shape != shape or sketch.units.shape != lists.centroids.shape[:1]:
            raise ValueError(f"This sketch is not of {len(keys)} keys of {keys.width} dimensions: build it anew.")
        return sketch


def sketch_of(keys: StoredKeys, lists: Lists) -> Sketch:
    """The sketch of keys on the CPU."""
    centroids, sizes = lists.centroids * lists.step, lists.starts.diff().long()
    own = torch.repeat_interleave(torch.arange(len(sizes)), sizes)  # (N,)

    def apart(block: slice) -> Tensor:
        return keys.floats(lists.rows[block].long()) - centroids[own[block]]

    blocks = [slice(start, start + _BLOCK) for start in range(0, len(keys), _BLOCK)]
    squares = torch.cat([apart(block).square().mean(dim=-1) for block in blocks])
    deviation = (torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, own, squares.double()) / sizes).sqrt()
    units = (_UNIT * deviation).float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = [_packed((apart(block) / units[own[block], None]).round().clamp(-8, 7)) for block in blocks]
    return Sketch(torch.cat(codes), units)


def _packed(numbers: Tensor) -> Tensor:
    """Rows (n, c) of -8 to 7 as in `Sketch.codes`."""
    rows, width = numbers.shape
    codes = torch.nn.functional.pad(numbers + 8, (0, width % 2, 0, -rows % _TOGETHER), value=8).to(torch.uint8)
    low, high = codes[:, ::2], codes[:, 1::2]
    return (low | high << 4).view(-1, _TOGETHER, low.shape[1]).transpose(1, 2).flatten(1)
