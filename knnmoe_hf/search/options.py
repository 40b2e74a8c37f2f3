"""The options of a search, for the command line too: this module imports no other library."""

from dataclasses import dataclass, field
from typing import Any

SEARCH_BACKENDS = ("auto", "torch", "ivf", "hnsw", "faiss")
"""The names of `search_backend`; `"ivf"` means `native_ivf` on a CPU with native code."""


def option(default: Any, help: str) -> Any:
    """A field of a class of options, with the sentence that the command line shows."""
    return field(default=default, metadata={"help": help})


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

    num_neighbors: int = option(16, "Nearest neighbours of each token in each layer.")
    search_backend: str = option("auto", "How neighbours are found; auto chooses by device and number of rows.")
    search_max_bytes: int = option(2**26, "Largest temporary tensor of an exact search, in bytes.")
    hnsw_m: int = option(16, "Links of each row in the graph of hnswlib.")
    hnsw_ef_construction: int = option(200, "Beam width in which hnswlib builds its graph.")
    hnsw_ef_search: int = option(64, "Beam width in which hnswlib searches its graph.")
