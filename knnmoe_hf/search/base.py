"""The interface of search engines: keys in, neighbours out."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from knnmoe_hf.search.options import SearchOptions

SLACK = 8
"""Candidates beyond k that are fetched by rounded scores before exact distances decide."""


class Neighbors(NamedTuple):
    """
    The nearest rows of each query, nearest first, equal distances in the order of their rows.

    NaN distances, as of a query that overflowed in float16, are returned as inf.
    """

    distances: Tensor  # (T, K) float32, squared L2
    rows: Tensor  # (T, K) int64

    def first(self, k: int) -> "Neighbors":
        """The k nearest; all where there are no more."""
        return self if self.rows.shape[1] <= k else Neighbors(self.distances[:, :k], self.rows[:, :k])


class StoredKeys(NamedTuple):
    """Keys (N, c) as they are stored; `codes * step` if there is a step, else `codes`."""

    codes: Tensor  # (N, c) float32, bfloat16, float16 or int8
    step: Tensor | None = None  # (c,) float32
    source: str | None = None  # content hash for the index cache; None unless these are all keys of a saved layer

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        """c."""
        return self.codes.shape[1]

    def floats(self, rows: Tensor | slice) -> Tensor:
        """Keys (..., c) float32 at an index (...) int64, always a copy, or at a slice, which may be a view."""
        if isinstance(rows, slice):
            codes = self.codes[rows]
        else:  # index_select takes a tenth of the time of an index of two dimensions
            codes = self.codes.index_select(0, rows.flatten()).view(*rows.shape, self.width)
        return codes.float() if self.step is None else codes * self.step

    def to(self, device: torch.device) -> "StoredKeys":
        """The same keys on `device`."""
        step = self.step.to(device) if self.step is not None else None
        return StoredKeys(self.codes.to(device), step, self.source)


class SearchEngine(ABC):
    """
    Searches one layer's keys. What an engine holds beside them is an index, which can always be built again.

    Args:
        keys: N rows, N at least 1, on the device where the layer runs.
        options: how to search.

    Attributes:
        least_rows: layers with fewer rows get an exact search instead.
        index_options: names of the options that the index depends on.
        index_format: version of the bytes of `tensors`; to be raised whenever older ones cannot be read, or would be
            built differently today.
        traceable: whether `search` branches on shapes only, never on data, so that torch.compile can trace it.
    """

    least_rows = 0
    index_options: tuple[str, ...] = ()
    index_format = 1
    traceable = False

    def __init__(self, keys: StoredKeys, options: SearchOptions):
        self.keys, self.options, self.max_bytes = keys, options, options.search_max_bytes

    def search(self, queries: Tensor, k: int) -> Neighbors:
        """
        The `min(k, N)` nearest rows of each query by squared L2 distance, computed in float32.

        A query's answer does not depend on the other queries of the batch. Approximate engines are tuned for
        `options.num_neighbors`; for a larger k they search more in proportion.

        Args:
            queries: (T, c), any float dtype, on any device.
            k: neighbours per query.

        Returns:
            `Neighbors` on the queries' device.

        Raises:
            ValueError: if the queries' width is not that of the keys, or k is not positive.
        """
        if queries.shape[1] != self.keys.width:
            raise ValueError(
                f"queries of {queries.shape[1]} dimensions do not fit keys of {self.keys.width}: encode them with the "
                "layer's own encoder."
            )
        if k < 1:
            raise ValueError(f"k={k} neighbours cannot be searched for: k must be at least 1.")
        plain = queries.detach() if queries.requires_grad else queries  # a detach that changes nothing takes time too
        plain = plain if plain.dtype == torch.float32 else plain.float()
        found = self._search(plain, min(k, len(self.keys)))
        if found.rows.device == queries.device:
            return found
        return Neighbors(found.distances.to(queries.device), found.rows.to(queries.device))

    @abstractmethod
    def _search(self, queries: Tensor, k: int) -> Neighbors:
        """`search` of float32 queries, on any device, k being from 1 to N."""

    @property
    def nbytes(self) -> int:
        """Bytes that the engine holds beside the keys."""
        return 0

    @classmethod
    def index_version(cls) -> str:
        """What makes an index on disk unusable when it changes: its format, and for some the library's version."""
        return str(cls.index_format)

    def tensors(self) -> dict[str, Tensor]:
        """The index for `from_tensors`; empty if it is built as fast as it is read."""
        return {}

    @classmethod
    def from_tensors(cls, keys: StoredKeys, options: SearchOptions, tensors: dict[str, Tensor]) -> "SearchEngine":
        """
        The engine with an index that `tensors` gave.

        Args:
            keys: the same that the index was built from.
            options: how to search.
            tensors: of another engine of this class.

        Raises:
            ValueError: if the index does not fit the keys.
        """
        return cls(keys, options)
