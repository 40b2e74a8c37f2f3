"""`search_backend="auto"`: the engine that suits a layer's rows and the device where it runs."""

from knnmoe_hf import native
from knnmoe_hf.search.base import StoredKeys
from knnmoe_hf.search.faiss import faiss_installed

_EXACT, _EXACT_ELSEWHERE = 2**11, 2**20  # rows, on a processor and on an accelerator
_GRAPH_BYTES = 2**24  # of a layer, whose graph is built in some seconds then


def choose(keys: StoredKeys) -> tuple[str, str]:
    """
    Name of an engine, and why it is that one.

    On a processor a few thousand rows are searched as fast as looked up in an index. Of more, compiled lists find the
    neighbours in the least time, with the smallest index. Where they were not compiled for wide vectors, faiss is
    next; of the packages that are always there, hnswlib, at some ten times the index and the time to build it. An
    accelerator should go through a million keys in less time than it takes to launch the operations of an index; that
    was not measured.
    """
    device, rows = keys.codes.device.type, len(keys)
    exact = _EXACT if device == "cpu" else _EXACT_ELSEWHERE
    if rows <= exact:
        return "torch", f"no more than {exact:,} rows on {device} are searched exactly"
    if device != "cpu":
        return "ivf", f"more than {exact:,} rows on {device}"
    if native.fast:
        return "ivf", f"more than {exact:,} rows on {device}, and lookups were compiled for its vectors"
    if faiss_installed():
        return "faiss", f"more than {exact:,} rows on {device}, and faiss is installed"
    graph = rows * (4 * keys.width + 144)  # float32 copies, and links
    if graph <= _GRAPH_BYTES:
        return "hnsw", f"a graph takes {graph / 2**20:,.0f} MiB; install faiss-cpu for less"
    return "ivf", f"a graph would take {graph / 2**20:,.0f} MiB; install faiss-cpu for a faster index"
