"""A step of decoding on a processor: what one token recalls, on arrays and plain numbers.

A model's weights go through all caches between two lookups, so that each operation begins by waiting for its own code
and data: on a tensor the longest, on an array half as long, on a number hardly at all. What is here, `search.one`,
`Levels.*_of_one`, `Confidence.of_one` and `Tokens.running_mean_of_one` say again, to rounding, what is said elsewhere
for any number of tokens.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from knnmoe_hf.encoding import ValueTable

_READABLE = (torch.float32, torch.float16, torch.int8)  # which numpy knows as well


def similarity(distances: Sequence[float], scale: float, gamma: float) -> float:
    """`mixing.similarity` of one token."""
    factor = -gamma / scale
    return sum([math.exp(factor * distance) for distance in distances]) / len(distances)


def neighbor_weights(distances: Sequence[float], scale: float, temperature: float) -> np.ndarray:
    """`mixing.neighbor_weights` of one token, (K,) float32."""
    factor = 1 / max(temperature * scale, torch.finfo(torch.float32).tiny)
    raised = [math.exp((distances[0] - distance) * factor) for distance in distances]
    total = sum(raised)
    return np.array([value / total for value in raised], dtype=np.float32)


class SingleTable:
    """
    A value table for one token at a time.

    Args:
        table: on the CPU, of codes that `can_read`.
    """

    def __init__(self, table: ValueTable):
        self.num_experts = table.num_experts
        self.codes = table.codes.numpy()
        self.experts = table.experts.numpy() if table.experts is not None else None
        self.rest = table.rest.numpy() if table.rest is not None else None
        self.step = table.step.numpy() if table.step is not None else None
        self.offset = table.offset.numpy() if table.offset is not None else None

    def recall(self, rows: np.ndarray, weights: np.ndarray) -> Tensor:
        """`ValueTable.recall` for rows (K,) and weights (K,): (1, E) float32."""
        codes = self.codes.take(rows, axis=0).astype(np.float32)  # (K, E or m)
        numbers = codes if self.step is None else codes * self.step + self.offset
        if self.experts is None:
            return torch.from_numpy((weights @ numbers)[None])
        numbers *= weights[:, None]
        where = self.experts.take(rows, axis=0).ravel()
        summed = np.bincount(where, numbers.ravel(), self.num_experts)
        if self.rest is not None:
            summed += self.rest.take(rows).astype(np.float32) @ weights
        return torch.from_numpy(summed.astype(np.float32)[None])


def can_read(table: ValueTable) -> bool:
    """Whether `SingleTable` reads such a table where it is."""
    return table.codes.device.type == "cpu" and table.codes.dtype in _READABLE
