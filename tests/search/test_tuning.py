"""How far an engine must search: recall of sampled queries, and the least effort that reaches it."""

import pytest
import torch

from knnmoe_hf.search import Neighbors, SearchOptions, StoredKeys
from knnmoe_hf.search.tuning import effort_for, fit_max_scan, least_effort, recall, sample_queries
from tests.search.helpers import BACKENDS, K, clustered, engine, random, stored_as


def neighbors(*distances: float) -> Neighbors:
    return Neighbors(torch.tensor([distances]), torch.arange(len(distances))[None])


@pytest.mark.parametrize(
    "found, exact, share",
    [
        ((1.0, 1.0, 1.0, 1.0), (0.0, 1.0, 1.0, 1.0), 0.75),  # what is as near as the last is no nearer one
        ((0.0, 1.0, 1.0, 1.0), (0.0, 1.0, 1.0, 1.0), 1),
        ((0.0, 2.0, 3.0, 4.0), (0.0, 1.0, 2.0, 3.0), 0.75),
    ],
)
def test_recall(found, exact, share):
    assert recall(neighbors(*found), neighbors(*exact)) == share


def test_the_least_effort_that_is_enough():
    tried = []

    def search(effort: int) -> Neighbors:
        tried.append(effort)
        return neighbors(0.0 if effort >= 100 else 5.0, 5.0)

    exact = neighbors(0.0, 5.0)
    assert least_effort(search, exact, 1, 1000) == tried[-1] and 100 <= tried[-1] < 130
    assert tried[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert least_effort(search, exact, 1, 90) is None and max(tried[tried.index(1, 1) :]) < 90


def test_half_as_many_keys_again_are_scanned_unless_that_is_an_eighth_of_all():
    def search(max_scan: int) -> Neighbors:
        return neighbors(0.0 if max_scan >= 1000 else 5.0, 5.0)

    exact = neighbors(0.0, 5.0)
    assert 1500 <= fit_max_scan(search, exact, 20_000, 512) <= 1.25 * 1500
    assert fit_max_scan(search, exact, 7000, 512) is None
    assert fit_max_scan(lambda max_scan: exact, exact, 20_000, 512) == 512


def test_sampled_queries_lie_between_keys():
    keys = StoredKeys(random(1000, 8))
    queries = sample_queries(keys)
    nearest = torch.cdist(queries, keys.codes).min(dim=-1).values
    assert queries.shape == (256, 8) and bool((nearest > 0).all())
    assert sample_queries(StoredKeys(random(3, 8))).shape == (3, 8)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "torch"])
def test_more_neighbours_than_an_engine_is_tuned_for_are_searched_with_more_effort(backend):
    keys, queries = clustered(12_000, width=24, clusters=300)
    keys = stored_as(keys, torch.int8)
    exact, built = engine(keys).search(queries, 4 * K), engine(keys, backend)
    assert recall(built.search(queries, 4 * K), exact) > 0.98


def test_efforts_grow_in_proportion_and_only_for_more_neighbours():
    few, many = SearchOptions(num_neighbors=4), SearchOptions(num_neighbors=48)
    assert [effort_for(k, 100, few) for k in (1, 4, 16, 17, 64)] == [100, 100, 100, 107, 400]
    assert [effort_for(k, 100, many) for k in (16, 48, 64)] == [100, 100, 134]
