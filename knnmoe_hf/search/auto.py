"""`search_backend="auto"`: the engine for a layer, from its number of rows and its device."""

from knnmoe_hf import native
from knnmoe_hf.search.base import StoredKeys

_EXACT, _EXACT_ON_ACCELERATORS = 2**11, 2**20  # rows that are searched exactly
_GRAPH_BYTES = 2**24  # largest graph of hnswlib, which takes some seconds to build


def choose(keys: StoredKeys) -> tuple[str, str]:
    """
    The name of an engine, and the reason for it.

    On a CPU an exact search of a few thousand rows takes no longer than one through an index. For more rows native
    lists are the fastest and smallest index; without native code for the processor's SIMD instructions, faiss where it
    is installed, else a graph of hnswlib if it is not too large. On an accelerator an exact search of a million keys
    should take less time than the many kernel launches of an index; this was not measured.
    """
    device, rows = keys.codes.device.type, len(keys)
    exact = _EXACT if device == "cpu" else _EXACT_ON_ACCELERATORS
    if rows <= exact:
        return "torch", f"up to {exact:,} rows on {device} are searched exactly"
    if device != "cpu":
        return "ivf", f"more than {exact:,} rows on {device}"
    if native.fast:
        return "ivf", f"more than {exact:,} rows on a CPU with native code"
    if faiss_installed():
        return "faiss", f"more than {exact:,} rows on a CPU without fast native code, and faiss is installed"
    graph = rows * (4 * keys.width + 144)  # float32 keys and links
    if graph <= _GRAPH_BYTES:
        return "hnsw", f"its graph takes {graph / 2**20:,.0f} MiB; install faiss-cpu for a smaller index"
    return "ivf", f"hnswlib's graph would take {graph / 2**20:,.0f} MiB; install faiss-cpu for a faster index"


def faiss_installed() -> bool:
    """Whether faiss can be imported, from whichever distribution; a folder of that name is not taken for it."""
    try:
        import faiss
    except ImportError:
        return False
    return hasattr(faiss, "index_factory")
