"""The contract of all engines: right distances, and the same answer for a query whatever is asked with it."""

import subprocess
import sys

import pytest
import torch

import knnmoe_hf.search
from knnmoe_hf.search import ENGINES, SearchOptions, StoredKeys, build_engine, engine_class
from tests.search.helpers import (
    BACKENDS,
    DTYPES,
    TORCH_IVF,
    K,
    assert_exact,
    clustered,
    engine,
    found_share,
    in_parts,
    random,
    same,
    stored_as,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_a_memory_smaller_than_k_gives_all_its_rows(backend, rows):
    keys, queries = clustered(rows)
    found = engine(keys, backend).search(queries, K + 10)
    assert found.rows.shape == (300, rows)
    assert_exact(found, queries, keys, rows)


@pytest.mark.parametrize(
    "backend, dtype",
    [(backend, dtype) for backend in BACKENDS for dtype in DTYPES if backend != "hnsw" or dtype == torch.int8],
    ids=str,
)
def test_distances_are_those_of_the_stored_keys(backend, dtype):
    keys, queries = clustered(6000, 48, clusters=100)
    stored = stored_as(keys, dtype)
    built = engine(stored, backend)
    found, exact = built.search(queries, K), engine(stored).search(queries, K)
    true = (queries.double()[:, None] - stored.floats(found.rows).double()).square().sum(dim=-1)
    torch.testing.assert_close(found.distances.double(), true, rtol=2e-5, atol=1e-5)
    assert bool((found.distances.diff(dim=-1) >= 0).all())
    assert bool((found.rows.sort(dim=-1).values.diff(dim=-1) > 0).all())
    assert found_share(found, exact) >= 0.97


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["clustered", "duplicates", "near_duplicates"])
def test_neighbours_do_not_depend_on_the_batch(backend, kind):
    keys, queries = clustered(4200, 40)
    if kind != "clustered":
        keys = keys[:30].repeat(140, 1)
        queries = torch.cat([keys[:30], keys[:30] + 0.1 * random(30, 40, seed=3)]).repeat(5, 1)
    if kind == "near_duplicates":
        keys = keys + 1e-5 * random(4200, 40, seed=4)
    built = engine(keys, backend)
    whole = built.search(queries, 6)
    for size in (1, 7, 26):
        assert same(in_parts(built, queries, 6, size), whole), size


@pytest.mark.parametrize("max_bytes", [2**16, 2**30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bound_of_temporary_memory_changes_nothing(backend, max_bytes):
    keys, queries = clustered(4200, 24, spread=0.05)
    one, other = (engine(keys, backend, search_max_bytes=size).search(queries, K) for size in (max_bytes, 2**20))
    assert same(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_equal_keys_are_no_error(backend):
    found = engine(torch.ones(5000, 16), backend).search(torch.ones(3, 16), K)
    assert torch.equal(found.distances, torch.zeros(3, K))
    assert all(len(set(row)) == K for row in found.rows.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_of_any_float_dtype_and_none_at_all(backend):
    keys, queries = clustered(1100, 24)
    built = engine(keys, backend)
    half = queries.bfloat16().requires_grad_()
    found = built.search(half, 4)
    assert not found.distances.requires_grad and same(found, built.search(half.detach().float(), 4))
    assert built.search(queries[:0], 4).rows.shape == (0, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_is_not_finite_gets_rows_at_inf_and_disturbs_no_other(backend, value):
    keys, queries = clustered(4200, 24)
    built = engine(keys, backend)
    others = torch.arange(300) != 3
    wanted = built.search(queries, 4)
    for where in (slice(None), 5):
        asked = queries.clone()
        asked[3, where] = value
        found = built.search(asked, 4)
        assert torch.equal(found.distances[others], wanted.distances[others])
        assert torch.equal(found.rows[others], wanted.rows[others])
        for some, query in ((found, 3), (built.search(asked[3:4], 4), 0)):
            assert torch.equal(some.distances[query], torch.full((4,), float("inf")))
            assert len(set(some.rows[query].tolist())) == 4 and bool((some.rows[query] < 4200).all())
            assert bool((some.rows[query] >= 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_tells_the_size_of_its_index(backend):
    assert engine(clustered(5000, 16)[0], backend).nbytes >= 5000 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_are_searched_by_what_they_stand_for(backend):
    """Dimensions of very different steps: the codes alone have other neighbours."""
    codes = torch.randint(-127, 128, (3000, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    stored = StoredKeys(codes, torch.logspace(-3, 1, 24))
    queries = (codes * stored.step)[::30] + 0.3 * stored.step * random(100, 24)
    found = engine(stored, backend, hnsw_ef_search=400).search(queries, 5)
    assert (found.rows[:, 0] == torch.arange(0, 3000, 30)).double().mean() > 0.98
    unscaled = engine(codes.float()).search(queries / stored.step, 5)
    assert (unscaled.rows == found.rows).double().mean() < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_default_dtype_changes_nothing(backend):
    keys, queries = clustered(4200, 16)
    wanted = engine(keys, backend).search(queries, K)
    torch.set_default_dtype(torch.float64)
    try:
        found = engine(keys.clone(), backend).search(queries, K)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(found, wanted)


@pytest.mark.parametrize("backend", ["torch", "ivf", "hnsw", "faiss"])
def test_queries_of_another_width_and_no_neighbours_are_refused(backend):
    built = engine(random(1100, 6), backend)
    with pytest.raises(ValueError, match="queries of 5 dimensions do not fit keys of 6"):
        built.search(random(3, 5), K)
    for k in (0, -3):
        with pytest.raises(ValueError, match=f"k={k} neighbours cannot be searched for"):
            built.search(random(3, 6), k)


def test_stored_keys_give_the_same_floats_at_any_index():
    stored = stored_as(random(20, 6), torch.int8)
    assert (len(stored), stored.width) == (20, 6)
    whole = stored.floats(slice(None))
    rows = torch.tensor([[3, 1], [0, 19]])
    assert whole.dtype == torch.float32 and torch.equal(stored.floats(rows), whole[rows])
    assert torch.equal(stored.floats(slice(5, 9)), whole[5:9])
    assert torch.equal(stored.to("cpu").codes, stored.codes) and stored_as(whole, torch.float16).to("cpu").step is None


@pytest.mark.parametrize("backend", ["faiss", "hnsw", "ivf"])
def test_the_same_keys_give_the_same_index(backend):
    keys = clustered(5000, 24)[0]
    one, other = (engine(keys.clone(), backend, hnsw_ef_search=20) for _ in range(2))
    assert one is not other
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_engines_over_the_same_tensor_are_shared_while_they_live():
    keys = StoredKeys(random(3000, 8))
    built = build_engine(keys, SearchOptions(search_backend="faiss"))
    assert build_engine(StoredKeys(keys.codes), SearchOptions(search_backend="faiss", hnsw_m=4)) is built
    assert build_engine(keys, SearchOptions(search_backend="faiss", num_neighbors=8)) is not built
    assert build_engine(StoredKeys(keys.codes.clone()), SearchOptions(search_backend="faiss")) is not built


def test_a_library_that_is_missing_is_named_with_the_way_out(monkeypatch):
    monkeypatch.delitem(sys.modules, "knnmoe_hf.search.faiss", raising=False)
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails
    for rows in (10, 3000):
        with pytest.raises(ImportError, match=r"pip install 'knnmoe_hf\[faiss\]', or use search_backend='auto'"):
            engine(random(rows, 8), "faiss")


def test_engines_are_imported_when_they_are_asked_for():
    """The package's own `__init__` is left out: this is about what this folder imports."""
    code = f"""
import sys, types
package = types.ModuleType("knnmoe_hf")
package.__path__ = {[knnmoe_hf.__path__[0]]!r}
sys.modules["knnmoe_hf"] = package
import knnmoe_hf.search
wrong = {{"transformers", "datasets", "pandas", "peft", "hnswlib", "faiss", "triton"}} & set(sys.modules)
wrong |= {{name for name in sys.modules if name.startswith("knnmoe_hf.") and name.split(".")[1] in (
    "config", "memory", "models", "lookup")}}
assert not wrong, wrong
import torch
knnmoe_hf.search.build_engine(knnmoe_hf.search.StoredKeys(torch.zeros(5, 3)), knnmoe_hf.search.SearchOptions())
assert not {{"hnswlib", "faiss"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_engine_of_the_table_can_be_imported():
    assert [engine_class(name).__name__ for name in ENGINES] == [path.split(".")[1] for path in ENGINES.values()]
    assert TORCH_IVF not in ENGINES
