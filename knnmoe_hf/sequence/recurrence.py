"""Decaying sums along sequences."""

import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf import native
from knnmoe_hf.transforms import plain


class Recurrence:
    """
    `sum[t] = gain[t] * sum[t-1] + values[t]` along each row of (B, S).

    Args:
        gain: (B, S) float32; what it is where a row begins is of no account.
    """

    def __init__(self, gain: Tensor):
        self.gain = gain.contiguous()
        self._levels: list[tuple[int, Tensor]] | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """The sums of values (B, S) float32; gradients pass. `values` itself where a row is but one token."""
        if self.gain.shape[1] == 1:
            return values
        compiled = native.on(values.device)
        alike = values.shape == self.gain.shape and values.device == self.gain.device
        if compiled is None or not alike or not values.dtype == self.gain.dtype == torch.float32:
            return self._in_steps(values)
        if torch.compiler.is_compiling() or values.requires_grad or not plain(values, self.gain):
            return self._in_steps(values)
        values = values.contiguous()
        sums = torch.empty_like(values)
        compiled.running_sums(values.data_ptr(), self.gain.data_ptr(), *values.shape, sums.data_ptr())
        return sums

    def _in_steps(self, values: Tensor) -> Tensor:
        """In log2(S) steps on all tokens at once."""
        if self._levels is None:
            self._levels, shift, product = [], 1, self.gain
            while shift < _reach(self.gain.shape[1]):
                self._levels.append((shift, product))
                product, shift = product * _shifted(product, shift), 2 * shift
        for shift, product in self._levels:
            values = values + product * _shifted(values, shift)
        return values


def _reach(length: int) -> int:
    """How far back a row's tokens have to look."""
    if not torch.compiler.is_compiling():
        return length
    reach = 1  # else there would be a graph for every power of 2, and no more than eight are compiled
    while reach < length:
        reach *= 64
    return reach


def _shifted(values: Tensor, shift: int) -> Tensor:
    """(B, S) with each row moved to the right, zeros in front."""
    return F.pad(values, (shift, 0))[:, : values.shape[1]]
