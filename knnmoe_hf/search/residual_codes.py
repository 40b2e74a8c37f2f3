"""Keys as 4-bit residuals from their list's centroid, by which native code picks the keys that it compares exactly."""

from typing import NamedTuple

import torch
from torch import Tensor

from knnmoe_hf.search.base import StoredKeys
from knnmoe_hf.search.lists import Lists, blocks

_BLOCK = 16  # keys side by side, as residual_codes.hpp reads them
_LEAST_UNIT = torch.finfo(torch.float32).tiny
_UNIT = 0.335  # standard deviations: the step that quantises normal numbers best in four bits (Max, 1960)


class ResidualCodes4bit(NamedTuple):
    """Residuals of N keys in the order of L lists: a key is about `centroid + units[list] * (code - 8)`."""

    codes: Tensor  # (ceil(N / 16), 16 ceil(c / 2)) uint8: 16 keys for each pair of dimensions, the first in low bits
    units: Tensor  # (L,) float32, positive

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], keys: StoredKeys, lists: Lists) -> "ResidualCodes4bit":
        """
        The residual codes in an index.

        Raises:
            ValueError: if they are missing or do not fit keys and lists.
        """
        if tensors.keys() >= set(cls._fields):
            codes, units = (tensors[name] for name in cls._fields)
            right = (codes.dtype, units.dtype) == (torch.uint8, torch.float32)
            if right and (codes.shape, units.shape) == _shapes(keys, lists):
                if bool(((units >= _LEAST_UNIT) & units.isfinite()).all()):
                    return cls(codes, units)
        raise ValueError(
            f"these residual codes are not of {len(keys)} keys of {keys.width} dimensions: build them anew."
        )


def _shapes(keys: StoredKeys, lists: Lists) -> tuple[tuple[int, ...], ...]:
    return (-(-len(keys) // _BLOCK), _BLOCK * -(-keys.width // 2)), (len(lists.centroids),)


def residual_codes(keys: StoredKeys, lists: Lists) -> ResidualCodes4bit:
    """Residual codes of keys on the CPU."""
    centroids, sizes = lists.centroids * lists.step, lists.sizes
    own = torch.repeat_interleave(torch.arange(len(sizes)), sizes)  # (N,)

    def residuals(block: slice) -> Tensor:
        return keys.floats(lists.rows[block].long()) - centroids[own[block]]

    squares = torch.cat([residuals(block).double().square().mean(dim=-1) for block in blocks(len(keys))])
    deviation = (torch.zeros_like(sizes, dtype=torch.float64).index_add_(0, own, squares) / sizes).sqrt()
    units = (_UNIT * deviation).float().clamp_min(_LEAST_UNIT)
    codes = torch.empty(_shapes(keys, lists)[0], dtype=torch.uint8)
    for block in blocks(len(keys)):
        quantized = (residuals(block) / units[own[block], None]).round().clamp(-8, 7)
        codes[block.start // _BLOCK : -(-block.stop // _BLOCK)] = _packed(quantized)
    return ResidualCodes4bit(codes, units)


def _packed(quantized: Tensor) -> Tensor:
    """Rows (n, c) of -8 to 7 in the layout of `ResidualCodes4bit.codes`."""
    rows, width = quantized.shape
    codes = torch.nn.functional.pad(quantized + 8, (0, width % 2, 0, -rows % _BLOCK), value=8).to(torch.uint8)
    low, high = codes[:, ::2], codes[:, 1::2]
    return (low | high << 4).view(-1, _BLOCK, low.shape[1]).transpose(1, 2).flatten(1)
