"""One query at a time, on arrays: there, operations on tensors cost more than what they do (`knnmoe_hf.single`)."""

import numpy as np
import torch

from knnmoe_hf.search.base import StoredKeys


class KeyArrays:
    """
    Keys (N, c) as numpy sees them.

    Args:
        keys: on the CPU, in another dtype than bfloat16, which numpy does not know.
    """

    def __init__(self, keys: StoredKeys):
        self.codes = keys.codes.numpy()
        self.step = keys.step.numpy() if keys.step is not None else None

    @classmethod
    def of(cls, keys: StoredKeys) -> "KeyArrays | None":
        """None where numpy cannot read them."""
        return cls(keys) if keys.codes.dtype != torch.bfloat16 else None

    def nearest(self, query: np.ndarray, rows: np.ndarray, k: int) -> tuple[list[float], np.ndarray]:
        """As `scores.rescore`, of one query (c,) and its candidates (C,)."""
        codes = self.codes.take(rows, axis=0)
        apart = codes.astype(np.float32) if self.step is None else codes * self.step
        apart -= query
        apart *= apart
        distances = apart.sum(axis=-1)
        order = np.lexsort((rows, distances))[:k]
        return distances[order].tolist(), rows[order]
