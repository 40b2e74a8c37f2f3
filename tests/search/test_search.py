"""All engines: exact where they say so, and the same for a query whatever it is asked with."""

import pytest
import torch

from knnmoe_hf import KNNMoEConfig
from knnmoe_hf.search import ENGINES, StoredKeys, build_engine
from knnmoe_hf.search.ivf import IvfSearch

UNCOMPILED = "ivf in torch"
"""The inverted file of other devices, and of processors for which nothing was compiled."""
BACKENDS = [*sorted(ENGINES), UNCOMPILED]
K = 16


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(rows: int, width: int = 64, clusters: int = 40, spread: float = 0.5, seed: int = 0):
    """Keys (rows, width) around common centres, off the origin, and 300 queries from the same clusters."""
    centres = 3 + _random(clusters, width, seed=99)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(clusters, (rows + 300,), generator=generator)
    points = centres[ids] + spread * torch.randn(rows + 300, width, generator=generator)
    return points[:rows], points[rows:]


def engine(keys, backend="torch", **options):
    keys = keys if isinstance(keys, StoredKeys) else StoredKeys(keys)
    if backend == UNCOMPILED:
        return IvfSearch(keys, KNNMoEConfig(search_backend="ivf", **options))
    return build_engine(keys, KNNMoEConfig(search_backend=backend, **options))


def stored_as(keys, dtype) -> StoredKeys:
    if dtype != torch.int8:
        return StoredKeys(keys.to(dtype))
    step = keys.abs().amax(dim=0) / 127
    return StoredKeys((keys / step).round().to(torch.int8), step)


def reference(queries, keys, k):
    """Nearest rows by float64 differences, equal distances in the order of rows."""
    exact = (queries.double()[:, None] - keys.double()).square().sum(-1)
    distances, rows = exact.sort(dim=-1, stable=True)
    return distances[:, :k], rows[:, :k]


def assert_exact(found, queries, keys, k):
    distances, rows = reference(queries, keys, k)
    assert found.distances.dtype == torch.float32 and found.rows.dtype == torch.int64
    torch.testing.assert_close(found.distances.double(), distances, rtol=1e-5, atol=1e-6)
    chosen = (queries.double()[:, None] - keys.double()[found.rows]).square().sum(-1)
    torch.testing.assert_close(chosen, distances, rtol=1e-6, atol=1e-12)
    assert (found.rows == rows).double().mean() > 0.999  # but for distances that float32 cannot tell apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("rows, k", [(2000, 1), (2000, K), (300, 200)])
def test_torch_equals_brute_force(rows, k, dtype):
    keys, queries = clustered(rows)
    stored = stored_as(keys, dtype)
    assert_exact(engine(stored).search(queries, k), queries, stored.floats(slice(None)), k)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4, 1e-3])
def test_torch_equals_brute_force_among_many_near_duplicates(noise):
    keys = clustered(30, spread=1.0)[0].repeat_interleave(60, dim=0) + noise * _random(1800, 64, seed=5)
    keys = keys[torch.randperm(1800, generator=torch.Generator().manual_seed(0))]
    queries = keys[:300] + noise * _random(300, 64, seed=6)
    assert_exact(engine(keys).search(queries, 4), queries, keys, 4)
    for one in queries[:5].split(1):
        assert_exact(engine(keys).search(one, 4), one, keys, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_a_memory_smaller_than_k_gives_all_its_rows(backend, rows):
    keys, queries = clustered(rows)
    found = engine(keys, backend).search(queries, K + 10)
    assert found.rows.shape == (300, rows)
    assert_exact(found, queries, keys, rows)


@pytest.mark.parametrize("max_bytes", [2**16, 2**18, 2**30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bound_of_memory_changes_nothing(backend, max_bytes):
    keys, queries = clustered(1200, spread=0.05)
    one, other = (engine(keys, backend, search_max_bytes=size).search(queries, K) for size in (max_bytes, 2**20))
    assert torch.equal(one.distances, other.distances) and torch.equal(one.rows, other.rows)


def test_no_score_matrix_is_larger_than_the_bound(monkeypatch):
    sizes, mm = [], torch.mm

    def recorded(*args, **kwargs):
        out = mm(*args, **kwargs)
        sizes.append(out.nbytes)
        return out

    keys, queries = clustered(5000)
    monkeypatch.setattr(torch, "mm", recorded)
    engine(keys, search_max_bytes=2**16).search(queries.repeat(4, 1), K)
    assert len(sizes) > 10 and max(sizes) <= 2**16


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "ivf"])  # which gathers nothing
def test_rescoring_gathers_no_more_than_the_bound(backend, monkeypatch):
    sizes, square = [], torch.Tensor.square_
    keys, queries = clustered(1000)
    built = engine(keys, backend, search_max_bytes=2**16)
    monkeypatch.setattr(torch.Tensor, "square_", lambda t: sizes.append(t.nbytes) or square(t))
    built.search(queries, K)
    assert sizes and max(sizes) <= 2**16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["clustered", "duplicates", "near_duplicates"])
@pytest.mark.parametrize("width", [32, 64, 200])
def test_neighbours_do_not_depend_on_how_many_are_asked_at_once(backend, kind, width):
    keys, queries = clustered(1500, width)
    if kind != "clustered":
        keys = keys[:30].repeat(50, 1)
        queries = torch.cat([keys[:30], keys[:30] + 0.1 * _random(30, width, seed=3)]).repeat(5, 1)
    if kind == "near_duplicates":
        keys = keys + 1e-5 * _random(1500, width, seed=4)
    built = engine(keys, backend)
    whole = built.search(queries, 6)
    for size in (1, 7, 26, 300):
        parts = [built.search(part, 6) for part in queries.split(size)]
        assert torch.equal(torch.cat([part.distances for part in parts]), whole.distances), size
        assert torch.equal(torch.cat([part.rows for part in parts]), whole.rows), size


def test_ties_are_broken_by_row():
    keys = clustered(10)[0].repeat(40, 1)
    found = engine(keys).search(keys[:10], 5)
    assert torch.equal(found.rows, torch.arange(10)[:, None] + 10 * torch.arange(5))
    assert torch.equal(found.distances, torch.zeros(10, 5))
    same = engine(torch.ones(700, 8)).search(torch.zeros(2, 8), 4)
    assert torch.equal(same.rows, torch.arange(4).repeat(2, 1)) and torch.equal(
        same.distances, torch.full((2, 4), 8.0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_both_engines_agree_on_a_small_memory_with_a_wide_beam(dtype):
    keys, queries = clustered(400)
    options = dict(hnsw_ef_search=400, hnsw_ef_construction=400, hnsw_m=32)
    exact, graph = (
        engine(stored_as(keys, dtype), backend, **options).search(queries, K) for backend in ("torch", "hnsw")
    )
    assert torch.equal(exact.rows, graph.rows) and torch.equal(exact.distances, graph.distances)


def test_hnsw_finds_nearly_all_neighbours_with_its_defaults():
    keys, queries = clustered(5000)
    found = engine(keys, "hnsw").search(queries, K)
    wanted = torch.cdist(queries.double(), keys.double()).topk(K, largest=False).indices
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.rows.tolist(), wanted.tolist()))
    recall = hits / wanted.numel()
    assert recall >= 0.98, f"recall at {K} neighbours is {recall:.4f} of 5000 keys, d=64"


def test_the_same_keys_give_the_same_graph():
    keys, queries = clustered(2000)
    one, other = (engine(keys, "hnsw", hnsw_ef_search=20).search(queries, K) for _ in range(2))
    assert torch.equal(one.rows, other.rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_equal_keys_are_no_error(backend):
    found = engine(torch.ones(3000, 16), backend).search(torch.ones(3, 16), K)
    assert torch.equal(found.distances, torch.zeros(3, K))
    assert all(len(set(row)) == K for row in found.rows.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_of_any_float_dtype_and_none_at_all(backend):
    keys, queries = clustered(200)
    built = engine(keys, backend)
    half = queries.bfloat16().requires_grad_()
    assert_exact(built.search(half, 4), half.detach(), keys, 4)
    assert built.search(queries[:0], 4).rows.shape == (0, 4)


@pytest.mark.parametrize("where", [slice(None), 5], ids=["whole", "in one dimension"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_is_not_a_number_is_infinitely_far_and_disturbs_no_other(backend, value, where):
    keys, queries = clustered(3000)
    built = engine(keys, backend)
    wanted = built.search(queries, 4)
    queries[3, where] = value
    found = built.search(queries, 4)
    others = torch.arange(300) != 3
    assert torch.equal(found.distances[others], wanted.distances[others])
    assert torch.equal(found.rows[others], wanted.rows[others])
    for rows, distances in (
        (found.rows[3], found.distances[3]),
        map(torch.ravel, reversed(built.search(queries[3:4], 4))),
    ):
        assert torch.equal(distances, torch.full((4,), float("inf")))
        assert bool(((rows >= 0) & (rows < 3000)).all())


def test_autocast_and_lower_matmul_precision_change_nothing():
    keys, queries = clustered(2000, spread=0.05)
    built = engine(keys)
    wanted = built.search(queries, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = built.search(queries, K)
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.distances, wanted.distances)
    try:
        torch.set_float32_matmul_precision("medium")
        found = built.search(queries, K)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.distances, wanted.distances)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_says_what_it_holds_beside_the_keys(backend):
    assert engine(clustered(5000)[0], backend).nbytes >= 5000 * 4


def test_a_graph_that_reaches_too_few_rows_is_searched_exactly():
    keys = torch.ones(300, 8)
    queries = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    config = KNNMoEConfig(search_backend="hnsw", hnsw_m=2, hnsw_ef_construction=1, hnsw_ef_search=1)
    found = build_engine(StoredKeys(keys), config).search(queries, 290)
    assert found.rows.shape == (5, 290)
    assert (found.rows.sort().values.diff() > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_bytes", [2**16, 2**26])
def test_codes_are_found_by_what_they_stand_for(backend, max_bytes):
    """Dimensions of very unlike steps: codes as such lie elsewhere."""
    codes = torch.randint(-127, 128, (3000, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    stored = StoredKeys(codes, torch.logspace(-3, 1, 24))
    keys = codes * stored.step
    queries = keys[::30] + 0.3 * stored.step * _random(100, 24)
    wide = dict(hnsw_ef_search=400, hnsw_ef_construction=400, hnsw_m=32)
    found = engine(stored, backend, search_max_bytes=max_bytes, **wide).search(queries, 5)
    assert torch.equal(found.rows[:, 0], torch.arange(0, 3000, 30))
    if backend not in ("faiss", "ivf"):  # which find nearly all of such keys, as they lie in no order
        assert_exact(found, queries, keys, 5)
    plain = engine(codes.float()).search(queries / stored.step, 5)
    assert (plain.rows == found.rows).double().mean() < 0.5


def test_stored_keys_give_the_same_floats_by_any_index():
    stored = stored_as(_random(20, 6), torch.int8)
    assert (len(stored), stored.width) == (20, 6)
    whole = stored.floats(slice(None))
    rows = torch.tensor([[3, 1], [0, 19]])
    assert whole.dtype == torch.float32 and torch.equal(stored.floats(rows), whole[rows])
    assert torch.equal(stored.floats(slice(5, 9)), whole[5:9])
    assert torch.equal(stored.to("cpu").codes, stored.codes) and stored_as(whole, torch.float16).to("cpu").step is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_default_dtype_changes_nothing(backend):
    keys, queries = clustered(1500)
    wanted = engine(keys, backend).search(queries, K)
    torch.set_default_dtype(torch.float64)
    try:
        found = engine(keys.clone(), backend).search(queries, K)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.distances, wanted.distances) and torch.equal(found.rows, wanted.rows)
