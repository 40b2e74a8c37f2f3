"""The inverted file in native code: exact distances of the keys it scans, the same rows in every build."""

import os

import pytest
import torch

from knnmoe_hf import native
from knnmoe_hf.search import SearchOptions, StoredKeys, build_engine
from knnmoe_hf.search.exact import TorchSearch
from knnmoe_hf.search.lists import scan_tensor, sort_into_lists
from knnmoe_hf.search.native_ivf import NativeIvfSearch
from tests.builds import BUILDS, use_build_for
from tests.search.helpers import (
    DTYPES,
    K,
    assert_forked,
    clustered,
    engine,
    found_share,
    in_parts,
    random,
    same,
    stored_as,
)

OPTIONS = SearchOptions(search_backend="ivf")


def test_the_native_code_is_there_and_used():
    assert native.kernels is not None, "it was not compiled: install the package where there is a C++ compiler"
    assert isinstance(build_engine(StoredKeys(random(3000, 8)), OPTIONS), NativeIvfSearch)


def assert_nearly_exact(built, stored, queries):
    found = built.search(queries, K)
    true = (queries.double()[:, None] - stored.floats(found.rows).double()).square().sum(dim=-1)
    torch.testing.assert_close(found.distances.double(), true, rtol=1e-5, atol=1e-5)
    assert bool((found.distances.diff(dim=-1) >= 0).all())
    assert bool((found.rows.sort(dim=-1).values.diff(dim=-1) > 0).all())
    assert found_share(found, TorchSearch(stored, OPTIONS).search(queries, K)) >= 0.98


SIZES = [("AVX2", dtype, width) for dtype in DTYPES for width in (3, 23, 48)]
SIZES += [("DEFAULT", dtype, 23) for dtype in DTYPES] + [("AVX2", torch.int8, 1), ("AVX2", torch.int8, 200)]


@pytest.mark.parametrize("build, dtype, width", SIZES, ids=str)
def test_every_build_gives_exact_distances_in_lists(build, dtype, width, monkeypatch):
    use_build_for(build, monkeypatch)
    keys, queries = clustered(6000, width)
    built = NativeIvfSearch(stored := stored_as(keys, dtype), OPTIONS)
    assert type(built.index) is native.kernels.Index
    assert len(built.lists.centroids) < 6000 and built.max_scan < 6000 // 8 * 1.5
    assert_nearly_exact(built, stored, queries)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_every_build_gives_exact_distances_with_one_list_per_key(build, dtype, monkeypatch):
    use_build_for(build, monkeypatch)
    keys, queries = clustered(2000, 23)
    built = NativeIvfSearch(stored := stored_as(keys, dtype), OPTIONS)
    assert len(built.lists.centroids) == 2000 and built.max_scan < 2000 // 8 * 1.5
    assert_nearly_exact(built, stored, queries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_every_build_finds_the_same_rows(dtype, monkeypatch):
    keys, queries = clustered(6000, width=256, clusters=200)
    stored = stored_as(keys, dtype)
    tensors, found = NativeIvfSearch(stored, OPTIONS).tensors(), {}
    for build in BUILDS:
        with monkeypatch.context() as patch:
            use_build_for(build, patch)
            found[build] = NativeIvfSearch.from_tensors(stored, OPTIONS, tensors).search(queries, K)
    one, other = found.values()
    assert torch.equal(one.rows, other.rows)
    torch.testing.assert_close(one.distances, other.distances, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def built():
    return NativeIvfSearch(stored_as(clustered(8000, 24, clusters=200)[0], torch.int8), OPTIONS)


def queries_of_built() -> torch.Tensor:
    return clustered(8000, 24, clusters=200)[1]


def test_a_query_gets_the_same_to_the_bit_in_any_batch(built):
    queries = queries_of_built()
    whole = built.search(queries, K)
    for size in (1, 2, 3, 5, 64):
        assert same(in_parts(built, queries, K, size), whole)


def test_threads_change_nothing(built, four_threads):
    queries = queries_of_built().repeat(4, 1)
    assert same(in_parts(built, queries, K, 1), built.search(queries, K))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_searches_batches_too(built, four_threads):
    queries = queries_of_built()
    wanted = built.search(queries, K)
    assert_forked(lambda: same(built.search(queries, K), wanted))


def test_few_keys_are_scanned_of_many(built):
    queries = queries_of_built()
    assert built.max_scan <= 1000 and built.residual_codes is None
    assert found_share(built.search(queries, K), engine(built.keys).search(queries, K)) >= 0.98


def test_keys_that_do_not_cluster_are_scanned_as_lists_of_their_own():
    stored, queries = stored_as(random(6000, 24), torch.int8), random(200, 24, seed=1)
    some = NativeIvfSearch(stored, OPTIONS)
    assert found_share(some.search(queries, K), TorchSearch(stored, OPTIONS).search(queries, K)) == 1
    assert some.tensors().keys() == {"scan"} and some.max_scan < 1000
    again = NativeIvfSearch.from_tensors(stored, OPTIONS, some.tensors())
    assert same(again.search(queries, K), some.search(queries, K))


def test_long_memories_that_do_not_cluster_are_compared_whole(monkeypatch, caplog):
    monkeypatch.setattr("knnmoe_hf.search.native_ivf._COPIED", 5000)
    stored, queries = stored_as(random(6000, 24), torch.int8), random(200, 24, seed=1)
    some = NativeIvfSearch(stored, OPTIONS)
    assert "6000 keys do not cluster" in caplog.text
    assert found_share(some.search(queries, K), TorchSearch(stored, OPTIONS).search(queries, K)) == 1
    again = NativeIvfSearch.from_tensors(stored, OPTIONS, some.tensors())
    assert same(again.search(queries, K), some.search(queries, K)) and some.nbytes == again.nbytes == 0


@pytest.mark.parametrize("scale, shift", [(1e-15, 0), (1e16, 0), (1, 10_000)])
def test_keys_may_be_very_small_or_large_or_far_from_zero_in_one_dimension(scale, shift):
    keys, queries = clustered(8000, width=23, clusters=200)
    keys, queries = keys * scale, queries * scale
    keys[:, 3] += shift
    queries[:, 3] += shift
    some = NativeIvfSearch(StoredKeys(keys), OPTIONS)
    assert some.max_scan < 1000 and len(some.lists.centroids) < 2000
    found, wanted = some.search(queries, K), TorchSearch(StoredKeys(keys), OPTIONS).search(queries, K)
    assert (found.rows[:, :, None] == wanted.rows[:, None]).any(dim=-1).double().mean() >= 0.98


@pytest.mark.parametrize("build", BUILDS)
def test_integer_sums_of_centroids_do_not_overflow(build, monkeypatch):
    use_build_for(build, monkeypatch)
    stored = stored_as(random(600, 1024).sign(), torch.int8)
    some = NativeIvfSearch.from_tensors(stored, OPTIONS, {"scan": scan_tensor(64, 64, 600)})
    assert torch.equal(some.search(stored.floats(slice(None)), 1).rows[:, 0], torch.arange(600))


def test_of_equal_keys_the_first_are_found():
    keys, _ = clustered(20_000, 24, clusters=400)
    equal = torch.arange(500, 20_000, 3)
    keys[equal] = keys[500].clone()
    some = NativeIvfSearch(stored_as(keys, torch.int8), OPTIONS)
    assert some.max_scan < 2000
    found = some.search(some.keys.floats(equal[:1]), K)
    assert torch.equal(found.rows[0], equal[:K]) and bool((found.distances == 0).all())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["ivf", "ivf in torch"])
def test_equal_keys_hide_no_other_of_their_list(backend, dtype):
    keys, _ = clustered(8000, clusters=100)
    keys[3000:3800] = keys[3000].clone()
    keys[3800:3820] = keys[3000] + 0.05 * random(20, 64)
    stored = stored_as(keys, dtype)
    tensors = sort_into_lists(stored)._asdict() | {"scan": scan_tensor(512, 512, 8000)}
    some = type(engine(random(9, 4), backend)).from_tensors(stored, OPTIONS, tensors)
    found = some.search(stored.floats(slice(3800, 3820)), K)
    assert torch.equal(found.rows[:, 0], torch.arange(3800, 3820))
    equal = some.search(stored.floats(slice(3000, 3001)), K)
    assert bool((equal.distances == 0).all()) and bool(((equal.rows >= 3000) & (equal.rows < 3800)).all())


def test_the_index_takes_few_bytes_a_row(built):
    assert built.nbytes < 4 * 8000 + len(built.lists.centroids) * (2 * 24 + 8 + 4) * 1.1


@pytest.mark.parametrize("rows", [1, 700, 8000])
def test_it_is_restored_from_its_tensors(rows, monkeypatch):
    keys, queries = clustered(rows, 24, clusters=200)
    stored = stored_as(keys, torch.int8)
    some = NativeIvfSearch(stored, OPTIONS)
    monkeypatch.setattr(NativeIvfSearch, "_fit", None)
    again = NativeIvfSearch.from_tensors(stored, OPTIONS, some.tensors())
    assert same(again.search(queries, K), some.search(queries, K)) and again.nbytes == some.nbytes


def test_an_index_that_does_not_fit_is_refused(built):
    tensors = built.tensors()
    for wrong in (
        {"scan": torch.tensor([0, 0, 8000])},
        {"scan": torch.tensor([512, 64, 8000])},  # there are no residual codes
        {"step": tensors["step"][1:]},
        {"codes": torch.zeros(500, 192, dtype=torch.uint8)},
    ):
        with pytest.raises(ValueError, match="anew"):
            NativeIvfSearch.from_tensors(built.keys, OPTIONS, tensors | wrong)
    with pytest.raises(ValueError, match="anew"):
        NativeIvfSearch.from_tensors(StoredKeys(built.keys.codes[:7000], built.keys.step), OPTIONS, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("rows", [2000, 6000], ids=["one list per key", "in lists"])
def test_a_query_that_is_not_finite_gets_rows_and_disturbs_no_other(value, rows):
    keys, queries = clustered(rows, 24)
    some = engine(keys, "ivf")
    wanted = some.search(queries, 4)
    queries[3] = value
    found, others = some.search(queries, 4), torch.arange(300) != 3
    assert torch.equal(found.rows[others], wanted.rows[others])
    assert bool(((found.rows >= 0) & (found.rows < rows)).all()) and len(found.rows[3].unique()) == 4
