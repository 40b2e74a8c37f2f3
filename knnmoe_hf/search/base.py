"""What a search engine is to the rest of the library, and the exact second look that all of them share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from knnmoe_hf import native
from knnmoe_hf.version import __version__

SLACK = 8
"""Candidates that an engine fetches beyond those asked for, so that rounding in its own distances decides nothing."""


@dataclass(frozen=True)
class SearchOptions:
    """
    The options that search engines read; `knnmoe_hf.KNNMoEConfig` documents them.

    Attributes:
        num_neighbors: neighbours per query for which approximate engines are tuned.
        search_backend: engine name.
        search_max_bytes: bound of temporary tensors in bytes.
        hnsw_m, hnsw_ef_construction, hnsw_ef_search: hnswlib's graph degree and beam widths.
    """

    num_neighbors: int = 16
    search_backend: str = "auto"
    search_max_bytes: int = 2**26
    hnsw_m: int = 16
    hnsw_ef_construction: int = 200
    hnsw_ef_search: int = 64


class Neighbors(NamedTuple):
    """
    The nearest rows of each query, nearest first, equal distances in the order of their rows.

    What is no number, as of a query that overflowed in half precision, is infinitely far.
    """

    distances: Tensor  # (T, K) float32, squared L2
    rows: Tensor  # (T, K) int64


class StoredKeys(NamedTuple):
    """Keys (N, c) as they are stored; int8 codes have the size of a step in each dimension."""

    codes: Tensor  # (N, c) float32, bfloat16, float16 or int8
    step: Tensor | None = None  # (c,) float32
    source: str | None = None  # names the content of keys that lie on disk, and are all that is there

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        """c."""
        return self.codes.shape[1]

    def floats(self, rows: Tensor | slice) -> Tensor:
        """Some of the keys, (..., c) float32: a copy by index (...) int64, maybe a view by slice."""
        if isinstance(rows, slice):
            codes = self.codes[rows]
        else:  # many times as fast as an index of two dimensions
            codes = self.codes.index_select(0, rows.flatten()).view(*rows.shape, self.width)
        return codes.float() if self.step is None else codes * self.step

    def to(self, device: torch.device) -> "StoredKeys":
        """The same on `device`."""
        step = self.step.to(device) if self.step is not None else None
        return StoredKeys(self.codes.to(device), step, self.source)


class SearchEngine(ABC):
    """
    Nearest rows of one layer's keys; an engine is a cache that can always be rebuilt from them.

    Args:
        keys: `StoredKeys` of N rows, N at least 1, on the device where the layer runs.
        options: how to search.

    Attributes:
        least_rows: memories of fewer are searched exactly instead.
        index_options: fields of the options that an index depends on.
        traceable: whether `search` branches on nothing but shapes, so that a compiler may look into it.
        proposes: whether `propose` is to be asked.
        scan: the keys for compiled code on the CPU (`knnmoe_hf.native`); None elsewhere, or where there is none.
    """

    least_rows = 0
    index_options: tuple[str, ...] = ()
    traceable = False
    proposes = False

    def __init__(self, keys: StoredKeys, options: SearchOptions):
        self.keys = keys
        self.max_bytes = options.search_max_bytes
        self.scan = self._scan()

    def _scan(self) -> "native.Index | None":
        compiled, step = native.on(self.keys.codes.device), self.keys.step
        step = step.float().contiguous() if step is not None else None
        return compiled.Index(self.keys.codes.contiguous(), step) if compiled is not None else None

    def search(self, queries: Tensor, k: int) -> Neighbors:
        """
        The `min(k, N)` nearest rows of each query by squared L2 distance in float32.

        A query's answer does not depend on how many others are asked with it. Approximate engines are fitted for
        `options.num_neighbors`; of many more they find fewer.

        Args:
            queries: (T, c), any float dtype, on any device.
            k: neighbours per query.

        Returns:
            `Neighbors` on the queries' device.

        Raises:
            ValueError: if queries are of another width than keys, or k is not positive.
        """
        if queries.shape[1] != self.keys.width:
            raise ValueError(f"queries of {queries.shape[1]} dimensions do not fit keys of {self.keys.width}.")
        if k < 1:
            raise ValueError(f"{k} neighbours cannot be searched for: k is at least 1.")
        k = min(k, len(self.keys))
        fetch = min(k + SLACK, len(self.keys))
        distances, rows = self._search(queries.detach().float(), k, fetch)
        return Neighbors(distances.to(queries.device), rows.to(queries.device))

    @property
    def scans_one(self) -> bool:
        """Whether a single query is better left to `scan`, maybe with what is proposed."""
        return self.scan is not None

    def propose(self, query: np.ndarray, k: int) -> np.ndarray | None:
        """
        Rows (C,) int64, at least k, to look for the nearest of one query (1, c) among; None if that is left to `scan`.
        """
        return None

    @abstractmethod
    def _search(self, queries: Tensor, k: int, fetch: int) -> Neighbors:
        """The k nearest of float32 queries, maybe out of `fetch` candidates that are scored again."""

    @property
    def nbytes(self) -> int:
        """Bytes that the engine holds beside the keys."""
        return 0

    @classmethod
    def version(cls) -> str:
        """Of the library whose index this is."""
        return __version__

    def tensors(self) -> dict[str, Tensor]:
        """What `of_tensors` needs to make this engine again without building it; empty if that is no gain."""
        return {}

    @classmethod
    def of_tensors(cls, keys: StoredKeys, options: SearchOptions, tensors: dict[str, Tensor]) -> "SearchEngine":
        """
        The engine over the same keys that gave these `tensors`.

        Raises:
            ValueError: for tensors that are not of these keys.
        """
        return cls(keys, options)
