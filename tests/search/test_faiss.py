"""faiss's inverted file: keys without loss, as many lists as sampled queries need."""

import os

import pytest
import torch

from knnmoe_hf.search import StoredKeys
from tests.search.helpers import DTYPES, K, assert_forked, clustered, engine, found_share, random, same


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_are_stored_without_loss(dtype):
    if dtype == torch.int8:
        codes = torch.randint(-128, 128, (3000, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
        codes[:2] = torch.tensor([-128, 127], dtype=torch.int8)[:, None]
        stored = StoredKeys(codes, torch.logspace(-6, 3, 12))
    else:
        stored = StoredKeys(random(3000, 12).to(dtype))
    index = engine(stored, "faiss").index
    index.make_direct_map()
    exact = stored.floats(slice(None))
    kept = torch.from_numpy(index.reconstruct_n(0, 3000))
    within = 1e-4 * (stored.step if dtype == torch.int8 else torch.zeros(12))
    assert bool(((kept - exact).abs() <= within).all())


def test_few_lists_are_probed_of_clustered_keys_and_enough():
    keys, queries = clustered(20_000, 24, clusters=400)
    built = engine(keys, "faiss")
    assert built.index.nprobe < built.index.nlist / 8
    assert found_share(built.search(queries, K), engine(keys).search(queries, K)) >= 0.98


def test_keys_that_do_not_cluster_are_all_compared(caplog):
    keys, queries = random(8000, 24), random(50, 24, seed=1)
    built = engine(keys, "faiss")
    assert built.index.nprobe == built.index.nlist and "8000 keys do not cluster" in caplog.text
    assert found_share(built.search(queries, K), engine(keys).search(queries, K)) == 1


def test_lists_that_hold_fewer_than_k_rows_are_made_up_for_by_an_exact_search():
    keys, queries = clustered(5000, 24)
    built = engine(keys, "faiss", num_neighbors=1000)
    built.index.nprobe = 1
    assert same(built.search(queries[:20], 1000), engine(keys).search(queries[:20], 1000))


def test_batches_are_asked_in_calls_too_small_for_a_matrix_product(monkeypatch):
    """In calls of 20 queries, faiss ranks lists by a product, whose rounding depends on the batch."""
    built, sizes = engine(clustered(2000, 8)[0], "faiss"), []

    class Recorded:
        def __init__(self, index):
            self.index = index

        def __getattr__(self, name):
            return getattr(self.index, name)

        def search(self, queries, k, **how):
            sizes.append(len(queries))
            return self.index.search(queries, k, **how)

    built.index = Recorded(built.index)
    for k in (4, 40):
        built.search(clustered(2000, 8)[1], k)
    assert sum(sizes) == 600 and max(sizes) < 20 * torch.get_num_threads()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_searches_batches_too(four_threads):
    keys, queries = clustered(5000, 24)
    built = engine(keys, "faiss")
    wanted = built.search(queries, K)
    assert_forked(lambda: same(built.search(queries, K), wanted))
