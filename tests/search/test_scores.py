"""Scores of keys: the least of them, and exact distances to all keys where scores are too close to call."""

import pytest
import torch

from knnmoe_hf.search import StoredKeys
from knnmoe_hf.search.scores import least, least_scores, nearest_of_all, packed, places_of, rescore
from tests.search.helpers import K, clustered, engine, random, stored_as


@pytest.fixture
def many_equal():
    """Int8 keys of which a third is equal, queries of which every other is next to those, and what each finds."""
    keys = clustered(9000)[0]
    keys[torch.randperm(9000, generator=torch.Generator().manual_seed(0))[:3000]] = keys[0].clone()
    stored = stored_as(keys, torch.int8)
    keys = stored.floats(slice(None))
    queries = clustered(1, seed=5)[1][:20]
    queries[::2] = keys[0] + 0.3 * random(10, 64, seed=6)
    every = torch.arange(9000).expand(20, -1)
    return stored, queries, rescore(queries, stored, every, K, 2**26)


@pytest.mark.parametrize("max_bytes", [2**16, 2**18, 2**26])
def test_thousands_of_equal_keys_are_compared_once_to_the_bit(many_equal, max_bytes, monkeypatch):
    stored, queries, wanted = many_equal
    fetched, square, sizes = [], torch.Tensor.square_, []

    def recorded(queries, keys, half_norms, fetch, step):
        fetched.append(fetch)
        return least_scores(queries, keys, half_norms, fetch, step)

    built = engine(stored, search_max_bytes=max_bytes)
    monkeypatch.setattr("knnmoe_hf.search.exact.least_scores", recorded)
    monkeypatch.setattr(torch.Tensor, "square_", lambda t: sizes.append(t.nbytes) or square(t))
    for size in (1, 3, 20):
        parts = [built.search(part, K) for part in queries.split(size)]
        assert torch.equal(torch.cat([part.distances for part in parts]), wanted.distances)
        assert torch.equal(torch.cat([part.rows for part in parts]), wanted.rows)
    assert set(fetched) == {K + 8, 8 * (K + 8)}
    assert max(sizes) <= max_bytes and sum(sizes) < 3 * 4 * 64 * (20 * 9000)
    next_to_them = wanted.rows[::2]
    assert bool((next_to_them.diff(dim=-1) > 0).all()) and bool((wanted.distances[::2].diff(dim=-1) == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("rows, width, count", [(1, 3, 1), (700, 1, 5), (3001, 48, 30)])
def test_nearest_of_all_is_rescore_of_all_rows_to_the_bit(rows, width, count, dtype):
    stored, queries = stored_as(random(rows, width), dtype), random(count, width, seed=1)
    queries[-1] = float("nan")
    every = torch.arange(rows).expand(count, -1)
    for k in {1, min(rows, K), min(rows, 500)}:
        wanted = rescore(queries, stored, every, k, 2**26)
        for max_bytes in (2**16, 2**26):
            found = nearest_of_all(queries, stored, k, max_bytes)
            assert torch.equal(found.distances, wanted.distances) and torch.equal(found.rows, wanted.rows)


def test_nearest_of_all_keeps_the_bound_of_memory(monkeypatch):
    sizes, topk = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda t, *a, **o: sizes.append(t.nbytes) or topk(t, *a, **o))
    nearest_of_all(random(1000, 16), StoredKeys(random(3000, 16, seed=1)), K, 2**16)
    assert len(sizes) > 10 and max(sizes) <= 2**16


def scores_of(kind: str, rows: int, columns: int):
    scores = random(rows, columns, seed=columns)
    if kind == "tied":
        return (2 * scores).round()
    if kind == "all alike":
        return torch.zeros(rows, columns)
    if kind == "ascending":
        return torch.arange(columns).float().expand(rows, -1)
    if kind == "descending":
        return -torch.arange(columns).float().expand(rows, -1)
    if kind == "neighbours":  # all of the least side by side
        scores[:, 65:128] -= 100
    if kind == "in one group":
        scores[:, 3 :: max(1, columns // 64)] -= 100
    if kind == "mostly infinite":
        scores[random(rows, columns, seed=1) < 1.5] = float("inf")
    if kind == "all infinite":
        scores[:] = float("inf")
    return scores


@pytest.mark.parametrize("k", [1, 4, 24])
@pytest.mark.parametrize("columns", [24, 64, 129, 640, 3263])
def test_least_gives_the_scores_of_topk(columns, k):
    kinds = ["random", "tied", "all alike", "ascending", "descending", "neighbours", "in one group"]
    for kind in [*kinds, "mostly infinite", "all infinite"]:
        scores = scores_of(kind, 7, columns)
        before = scores.clone()
        values, places = least(scores, k)
        wanted = scores.topk(k, dim=-1, largest=False).values
        assert torch.equal(values, wanted), kind
        assert torch.equal(scores.gather(1, places), wanted), kind
        assert all(len(set(row)) == k for row in places.tolist()), kind
        assert torch.equal(scores, before)


def test_least_of_no_query():
    values, places = least(torch.zeros(0, 5000), 3)
    assert values.shape == places.shape == (0, 3)


def test_packed_numbers_sort_by_score_then_by_place():
    scores = torch.tensor([1.0, -2.0, float("inf"), -2.0, 0.0, -float("inf"), 1e-40, -1e-40])
    places = torch.tensor([7, 2**32 - 1, 0, 5, 1, 3, 4, 6])
    order = packed(scores, places).argsort()
    assert order.tolist() == sorted(range(8), key=lambda i: (scores[i].item(), places[i].item()))
    assert torch.equal(places_of(packed(scores, places)), places)
