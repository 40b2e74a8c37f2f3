"""Keys, queries and engines for the tests of search."""

import os
import signal

import torch

from knnmoe_hf.search import SearchEngine, SearchOptions, StoredKeys, build_engine
from knnmoe_hf.search.ivf import IvfSearch

TORCH_IVF = "ivf in torch"
"""The inverted file of accelerators, and of CPUs without native code."""

BACKENDS = ["faiss", "hnsw", "ivf", "torch", TORCH_IVF]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
K = 16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(rows: int, width: int = 64, clusters: int = 40, spread: float = 0.5, seed: int = 0):
    """Keys (rows, width) around common centres, off the origin, and 300 queries from the same clusters."""
    centres = 3 + random(clusters, width, seed=99)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(clusters, (rows + 300,), generator=generator)
    points = centres[ids] + spread * torch.randn(rows + 300, width, generator=generator)
    return points[:rows], points[rows:]


def stored_as(keys: torch.Tensor, dtype: torch.dtype) -> StoredKeys:
    if dtype != torch.int8:
        return StoredKeys(keys.to(dtype))
    step = keys.abs().amax(dim=0) / 127
    return StoredKeys((keys / step).round().to(torch.int8), step)


def engine(keys, backend: str = "torch", **options) -> SearchEngine:
    """An engine over keys; a graph of hnswlib is built three times as fast as with the default options."""
    options = {"hnsw_ef_construction": 60} | options
    keys = keys if isinstance(keys, StoredKeys) else StoredKeys(keys)
    if backend == TORCH_IVF:
        return IvfSearch(keys, SearchOptions(search_backend="ivf", **options))
    return build_engine(keys, SearchOptions(search_backend=backend, **options))


def reference(queries: torch.Tensor, keys: torch.Tensor, k: int):
    """Nearest rows by float64 differences, equal distances in the order of rows."""
    exact = (queries.double()[:, None] - keys.double()).square().sum(-1)
    distances, rows = exact.sort(dim=-1, stable=True)
    return distances[:, :k], rows[:, :k]


def assert_exact(found, queries: torch.Tensor, keys: torch.Tensor, k: int) -> None:
    distances, rows = reference(queries, keys, k)
    assert found.distances.dtype == torch.float32 and found.rows.dtype == torch.int64
    torch.testing.assert_close(found.distances.double(), distances, rtol=1e-5, atol=1e-6)
    true = (queries.double()[:, None] - keys.double()[found.rows]).square().sum(-1)
    torch.testing.assert_close(true, distances, rtol=1e-6, atol=1e-12)
    assert (found.rows == rows).double().mean() > 0.999  # but for distances that float32 cannot tell apart


def same(found, wanted) -> bool:
    """Whether two answers are the same to the bit."""
    return torch.equal(found.distances, wanted.distances) and torch.equal(found.rows, wanted.rows)


def in_parts(built: SearchEngine, queries: torch.Tensor, k: int, size: int):
    """The answer of so many queries at a time."""
    parts = [built.search(part, k) for part in queries.split(size)]
    return type(parts[0])(*(torch.cat(tables) for tables in zip(*parts)))


def found_share(found, exact) -> float:
    """Share of the exact neighbours that were found; rows as near as the last one count."""
    bound = exact.distances[:, -1:] * (1 + 1e-5) + 1e-5
    return (found.distances <= bound).double().mean().item()


def assert_forked(holds, seconds: int = 20) -> None:
    """That `holds()` in a forked process, within so many seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)  # kills a process that waits for threads that it does not have
        os._exit(0 if holds() else 1)
    assert os.waitpid(child, 0)[1] == 0
