"""What a search engine is to the rest of the library, and the exact second look that all of them share."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig

SLACK = 8
"""Candidates that an engine fetches beyond those asked for, so that rounding in its own distances decides nothing."""


class Neighbors(NamedTuple):
    """The nearest rows of each query, nearest first, equal distances in the order of their rows."""

    distances: Tensor  # (T, K) float32, squared L2
    rows: Tensor  # (T, K) int64


class SearchEngine(ABC):
    """
    Nearest rows of one layer's keys; an engine is a cache that can always be rebuilt from them.

    Args:
        keys: (N, d) float32, bfloat16 or float16, N at least 1, on the device where the layer runs.
        config: the memory's configuration, for the engine's own options.
    """

    def __init__(self, keys: Tensor, config: KNNMoEConfig):
        self.keys = keys
        self.max_bytes = config.search_max_bytes

    def search(self, queries: Tensor, k: int) -> Neighbors:
        """
        The `min(k, N)` nearest rows of each query by squared L2 distance in float32.

        A query's answer does not depend on how many others are asked with it.

        Args:
            queries: (T, d), any float dtype, on any device.
            k: neighbours per query.

        Returns:
            `Neighbors` on the queries' device.
        """
        k = min(k, self.keys.shape[0])
        found = self._search(queries.detach().float(), k, min(k + SLACK, self.keys.shape[0]))
        return Neighbors(*(tensor.to(queries.device) for tensor in found))

    @abstractmethod
    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        """Fetches `fetch` candidates per query and hands them to `rescore`."""

    @property
    def nbytes(self) -> int:
        """Bytes that the engine holds beside the keys."""
        return 0


def rescore(queries: Tensor, keys: Tensor, candidates: Tensor, k: int, max_bytes: int) -> Neighbors:
    """
    The k nearest of each query's candidates, by distances computed anew, element by element.

    An engine's own distances may depend on the batch (a matrix product does) or be approximate; these do not.

    Args:
        queries: (T, d) float32.
        keys: (N, d).
        candidates: (T, C) int64, distinct in each row, C at least k.
        k: neighbours to keep.
        max_bytes: bound of the keys gathered at once, (t, c, d) float32.
    """
    rows = candidates.sort(dim=-1).values
    fits = max(1, max_bytes // (4 * keys.shape[1]))  # keys gathered at once
    columns = min(rows.shape[1], fits)
    exact = torch.empty(rows.shape, dtype=torch.float32, device=queries.device)  # (T, C)
    for some, asked, out in zip(*(tensor.split(max(1, fits // columns)) for tensor in (rows, queries, exact))):
        for part, target in zip(some.split(columns, dim=-1), out.split(columns, dim=-1)):
            target.copy_((keys[part].float() - asked[:, None]).square().sum(dim=-1))
    distances, order = exact.sort(dim=-1, stable=True)
    return Neighbors(distances[:, :k], rows.gather(-1, order[:, :k]))
