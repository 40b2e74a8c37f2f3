"""The inverted file in torch: no branch on data, no more memory than allowed, the keys of the nearest lists."""

import pytest
import torch

from knnmoe_hf.search import SearchOptions
from knnmoe_hf.search.ivf import IvfSearch
from knnmoe_hf.search.native_ivf import NativeIvfSearch
from tests.search.helpers import DTYPES, TORCH_IVF, K, clustered, engine, found_share, random, same, stored_as

OPTIONS = SearchOptions(search_backend="ivf")


@pytest.fixture(scope="module")
def built():
    return engine(stored_as(clustered(8000, 24, clusters=200)[0], torch.int8), TORCH_IVF)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_most_neighbours_are_found_among_few_keys(dtype):
    keys, queries = clustered(8000, 24, clusters=200)
    stored = stored_as(keys, dtype)
    some = engine(stored, TORCH_IVF)
    assert some.max_scan < 1000
    assert found_share(some.search(queries, K), engine(stored).search(queries, K)) >= 0.98


def test_it_scans_the_lists_of_the_native_form(built):
    native = NativeIvfSearch(built.keys, OPTIONS)
    assert all(torch.equal(one, other) for one, other in zip(built.lists, native.lists))
    assert built.max_scan == native.max_scan
    queries = clustered(8000, 24, clusters=200)[1]
    found, wanted = built.search(queries, K), native.search(queries, K)
    assert (found.rows == wanted.rows).double().mean() > 0.98


def test_keys_that_do_not_cluster_are_all_compared():
    keys, queries = random(6000, 24), random(100, 24, seed=1)
    some = engine(keys, TORCH_IVF)
    assert some.max_scan == 6000 and not some.traceable
    assert same(some.search(queries, K), engine(keys).search(queries, K))


def test_the_index_takes_few_bytes_a_row(built):
    assert built.nbytes < 8000 * 16 + len(built.lists.centroids) * 24 * 8


@pytest.mark.parametrize("rows", [5, 8000])
def test_an_engine_is_restored_from_its_tensors(rows, monkeypatch):
    keys, queries = clustered(rows, 24, clusters=200)
    stored = stored_as(keys, torch.int8)
    first = IvfSearch(stored, OPTIONS)
    monkeypatch.setattr(IvfSearch, "_fit", None)
    if first.exact is None:
        monkeypatch.setattr("knnmoe_hf.search.ivf.TorchSearch", None)  # it would read all keys
    again = IvfSearch.from_tensors(stored, OPTIONS, first.tensors())
    assert same(again.search(queries, K), first.search(queries, K)) and again.nbytes == first.nbytes


@pytest.mark.parametrize("k", [50, 2000])
def test_more_neighbours_than_it_was_tuned_for_are_all_there(built, k):
    queries = clustered(8000, 24, clusters=200)[1][:50]
    found, exact = built.search(queries, k), engine(built.keys).search(queries, k)
    assert found.rows.shape == (50, k) and bool((found.rows.sort(dim=-1).values.diff(dim=-1) > 0).all())
    assert found_share(found, exact) >= 0.9


def test_no_table_is_larger_than_the_bound(built, monkeypatch):
    sizes, select = [], torch.Tensor.index_select
    queries = clustered(8000, 24, clusters=200)[1][:50]
    small = IvfSearch.from_tensors(built.keys, SearchOptions(search_max_bytes=2**16), built.tensors())

    def recorded(*args):
        out = select(*args)
        sizes.append(4 * out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "index_select", recorded)
    found = small.search(queries, K)
    assert sizes and max(sizes) <= 2**16
    assert torch.equal(found.rows, built.search(queries, K).rows)


def test_autocast_and_products_in_reduced_precision_change_nothing(built, monkeypatch):
    queries = clustered(8000, 24, clusters=200)[1]
    wanted, lists, mm = built.search(queries, K), built._nearest_lists(queries, 20), torch.mm
    monkeypatch.setattr(torch, "mm", lambda left, right: mm(left.bfloat16().float(), right.bfloat16().float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(built._nearest_lists(queries, 20), lists)
        assert same(built.search(queries, K), wanted)


def test_lists_that_hold_too_few_keys_are_not_read_beyond_their_ends(built):
    queries = clustered(8000, 24, clusters=200)[1]
    first = built._nearest_lists(queries, 2)
    enough = built.sizes[first].sum(dim=-1) >= 12
    assert enough.double().mean() > 0.5
    found = built._nearest(queries[enough], k=4, fetch=12, max_scan=1000, nprobe=2)
    own = torch.repeat_interleave(torch.arange(len(built.sizes)), built.sizes)[built.lists.rows.argsort()]
    assert bool((own[found.rows][..., None] == first[enough][:, None]).any(dim=-1).all())
    assert bool((found.rows.sort(dim=-1).values.diff(dim=-1) > 0).all())
