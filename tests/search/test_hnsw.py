"""hnswlib's graph."""

import torch

from tests.search.helpers import K, assert_exact, clustered, engine, found_share, random, same


def test_it_is_exact_on_a_small_memory_with_a_wide_beam():
    keys, queries = clustered(400)
    found = engine(keys, "hnsw", hnsw_ef_search=400, hnsw_ef_construction=400, hnsw_m=32).search(queries, K)
    assert_exact(found, queries, keys, K)


def test_it_finds_nearly_all_neighbours_with_its_defaults():
    keys, queries = clustered(5000)
    assert (
        found_share(engine(keys, "hnsw", hnsw_ef_construction=200).search(queries, K), engine(keys).search(queries, K))
        >= 0.98
    )


def test_a_graph_that_connects_too_few_rows_is_replaced_by_an_exact_search():
    built = engine(torch.ones(300, 8), "hnsw", hnsw_m=2, hnsw_ef_construction=1, hnsw_ef_search=1)
    queries = random(5, 8)
    found = built.search(queries, 290)
    assert found.rows.shape == (5, 290) and bool((found.rows.sort().values.diff() > 0).all())


def test_only_the_queries_that_fail_are_searched_exactly():
    keys, queries = clustered(3000, 16)
    built = engine(keys, "hnsw", hnsw_ef_search=16, hnsw_ef_construction=10, hnsw_m=2)
    wanted, index = built.search(queries, K), built.index

    class Fails:
        set_ef = index.set_ef

        def knn_query(self, some, **options):
            if (some[:, 0] > 50).any():
                raise RuntimeError("too few rows")
            return index.knn_query(some, **options)

    built.index = Fails()
    queries[3, 0] = 100
    found, others = built.search(queries, K), torch.arange(300) != 3
    assert same(type(found)(*(table[others] for table in found)), type(found)(*(table[others] for table in wanted)))
    assert same(built.search(queries[3:4], K), engine(keys).search(queries[3:4], K))
