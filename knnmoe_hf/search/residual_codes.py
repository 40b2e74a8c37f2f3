"""Keys in four bits a number, list after list, by which compiled code chooses those that it reads."""

from typing import NamedTuple

import torch
from torch import Tensor

from knnmoe_hf.search.base import StoredKeys
from knnmoe_hf.search.lists import Lists, blocks

_TOGETHER = 16  # keys side by side: see sketch.hpp
_LEAST = torch.finfo(torch.float32).tiny
_UNIT = 0.335  # of the standard deviation: the step of four bits that rounds normal numbers best (Max, 1960)


class ResidualCodes4bit(NamedTuple):
    """How far the keys of N rows in L lists are from their centroids, about: half of an int8 key's bytes."""

    codes: Tensor  # (ceil(N / 16), 16 ceil(c / 2)) uint8, plus 8: of 16 rows two dimensions a byte, lower bits first
    units: Tensor  # (L,) float32, what a code of each list counts

    @classmethod
    def read(cls, index: dict[str, Tensor], keys: StoredKeys, lists: Lists) -> "ResidualCodes4bit":
        """
        The sketch among an engine's tensors.

        Raises:
            ValueError: if it is not of these keys in these lists.
        """
        if index.keys() >= set(cls._fields):
            sketch = cls(*(index[name] for name in cls._fields))
            units_are_good = bool(((sketch.units >= _LEAST) & sketch.units.isfinite()).all())
            dtypes = sketch.codes.dtype, sketch.units.dtype
            shapes = sketch.codes.shape, sketch.units.shape
            if units_are_good and dtypes == (torch.uint8, torch.float32) and shapes == _shapes(keys, lists):
                return sketch
        raise ValueError(f"This sketch is not of {len(keys)} keys of {keys.width} dimensions: build it anew.")


def _shapes(keys: StoredKeys, lists: Lists) -> tuple[tuple[int, ...], ...]:
    return (-(-len(keys) // _TOGETHER), _TOGETHER * -(-keys.width // 2)), (len(lists.centroids),)


def residual_codes(keys: StoredKeys, lists: Lists) -> ResidualCodes4bit:
    """The sketch of keys on the CPU."""
    centroids, sizes = lists.centroids * lists.step, lists.starts.diff().long()
    own = torch.repeat_interleave(torch.arange(len(sizes)), sizes)  # (N,)

    def apart(block: slice) -> Tensor:
        return keys.floats(lists.rows[block].long()) - centroids[own[block]]

    squares = torch.cat([apart(block).double().square().mean(dim=-1) for block in blocks(len(keys))])
    deviation = (torch.zeros_like(sizes, dtype=torch.float64).index_add_(0, own, squares) / sizes).sqrt()
    units = (_UNIT * deviation).float().clamp_min(_LEAST)
    codes = torch.empty(_shapes(keys, lists)[0], dtype=torch.uint8)
    for block in blocks(len(keys)):
        numbers = (apart(block) / units[own[block], None]).round().clamp(-8, 7)
        codes[block.start // _TOGETHER : -(-block.stop // _TOGETHER)] = _packed(numbers)
    return ResidualCodes4bit(codes, units)


def _packed(numbers: Tensor) -> Tensor:
    """Rows (n, c) of -8 to 7 as in `ResidualCodes4bit.codes`."""
    rows, width = numbers.shape
    codes = torch.nn.functional.pad(numbers + 8, (0, width % 2, 0, -rows % _TOGETHER), value=8).to(torch.uint8)
    low, high = codes[:, ::2], codes[:, 1::2]
    return (low | high << 4).view(-1, _TOGETHER, low.shape[1]).transpose(1, 2).flatten(1)
