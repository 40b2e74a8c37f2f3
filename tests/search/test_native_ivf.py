"""Lists that compiled code looks into: exact distances, any width and dtype, the same rows in every build."""

from contextlib import suppress

import pytest
import torch

from knnmoe_hf import KNNMoEConfig, native
from knnmoe_hf.search import Neighbors, StoredKeys
from knnmoe_hf.search.exact import TorchSearch
from knnmoe_hf.search.ivf import IvfSearch
from knnmoe_hf.search.lists import sort_into_lists
from knnmoe_hf.search.native_ivf import NativeIvfSearch
from knnmoe_hf.search.reach import share_found
from tests.builds import LEVELS, use_build_for
from tests.search.test_search import UNCOMPILED, K, _random, clustered, engine, stored_as

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def share(found, wanted) -> float:
    return (found.distances <= wanted.distances[:, -1:] * (1 + 1e-5) + 1e-5).double().mean().item()


def test_the_compiled_part_is_there():
    assert native.kernels is not None, "it was not compiled: pip install it where there is a C++ compiler"
    assert isinstance(engine(clustered(3000)[0], "ivf"), NativeIvfSearch)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 16, 23, 48, 200])
@pytest.mark.parametrize("rows", [2000, 9000], ids=["each by itself", "in lists"])
def test_every_build_gives_exact_distances(level, dtype, width, rows, monkeypatch):
    use_build_for(level, monkeypatch)
    keys, queries = clustered(rows, width)
    stored = stored_as(keys, dtype)
    built = NativeIvfSearch(stored, KNNMoEConfig(search_backend="ivf"))
    assert type(built.scan) is native.kernels.Index
    assert (len(built.lists.centroids) < rows) == (rows == 9000) and built.budget < rows // 8
    found = built.search(queries, K)
    apart = (queries.double()[:, None] - stored.floats(found.rows).double()).square().sum(dim=-1)
    torch.testing.assert_close(found.distances.double(), apart, rtol=1e-5, atol=1e-5)
    assert bool((found.distances.diff(dim=-1) >= 0).all())
    assert bool((found.rows.sort(dim=-1).values.diff(dim=-1) > 0).all())
    assert share(found, TorchSearch(stored, KNNMoEConfig()).search(queries, K)) >= 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_every_build_finds_the_same_rows(dtype, monkeypatch):
    keys, queries = clustered(9000, width=2048, clusters=300)
    stored, found = stored_as(keys, dtype), []
    for level in LEVELS:
        with monkeypatch.context() as patch, suppress(pytest.skip.Exception):
            use_build_for(level, patch)
            found.append(NativeIvfSearch(stored, KNNMoEConfig(search_backend="ivf")).search(queries, K).rows)
    assert found and all(torch.equal(rows, found[0]) for rows in found)


def test_a_query_gets_the_same_to_the_bit_in_any_company():
    keys, queries = clustered(20_000, clusters=400)
    built = engine(stored_as(keys, torch.int8), "ivf")
    whole = built.search(queries, K)
    for size in (1, 2, 3, 5, 64):
        parts = [built.search(part, K) for part in queries.split(size)]
        assert torch.equal(torch.cat([part.distances for part in parts]), whole.distances)
        assert torch.equal(torch.cat([part.rows for part in parts]), whole.rows)


def test_as_near_as_the_last_is_no_nearer_one():
    def found(*distances):
        return Neighbors(torch.tensor([distances]), torch.arange(4)[None])

    assert share_found(found(1.0, 1.0, 1.0, 1.0), found(0.0, 1.0, 1.0, 1.0)) == 0.75
    assert share_found(found(0.0, 1.0, 1.0, 1.0), found(0.0, 1.0, 1.0, 1.0)) == 1
    assert share_found(found(0.0, 2.0, 3.0, 4.0), found(0.0, 1.0, 2.0, 3.0)) == 0.75


def test_few_keys_are_searched_of_many():
    keys, queries = clustered(20_000, clusters=400)
    built = engine(stored_as(keys, torch.int8), "ivf")
    assert built.budget <= 2000
    assert share(built.search(queries, K), engine(built.keys).search(queries, K)) >= 0.98


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32], ids=str)
def test_keys_without_any_order_are_all_looked_at(dtype):
    stored, queries = stored_as(_random(20_000, 24), dtype), _random(200, 24, seed=1)
    built = NativeIvfSearch(stored, KNNMoEConfig())
    exact = TorchSearch(stored, KNNMoEConfig()).search(queries, K)
    assert share(built.search(queries, K), exact) >= (1 if dtype == torch.int8 else 0.999)
    assert built.tensors().keys() == {"reach"} and built.budget < 2000
    again = NativeIvfSearch.of_tensors(stored, KNNMoEConfig(), built.tensors())
    assert torch.equal(again.search(queries, K).rows, built.search(queries, K).rows)


def test_long_memories_in_no_order_are_compared_whole(monkeypatch, caplog):
    monkeypatch.setattr("knnmoe_hf.search.native_ivf._COPIED", 10_000)
    stored, queries = stored_as(_random(20_000, 24), torch.int8), _random(200, 24, seed=1)
    built = NativeIvfSearch(stored, KNNMoEConfig())
    assert "20000 keys lie in no order, or some of them" in caplog.text
    exact = TorchSearch(stored, KNNMoEConfig()).search(queries, K)
    assert share(built.search(queries, K), exact) == 1 and built.nbytes == 0
    again = NativeIvfSearch.of_tensors(stored, KNNMoEConfig(), built.tensors())
    assert torch.equal(again.search(queries, K).rows, built.search(queries, K).rows) and again.nbytes == 0


@pytest.mark.parametrize("scale", [1e-15, 1e16])
def test_keys_may_be_very_small_or_large(scale):
    keys, queries = clustered(20_000, width=23, clusters=400)
    built = NativeIvfSearch(StoredKeys(keys * scale), KNNMoEConfig())
    assert built.budget < 2000 and len(built.lists.centroids) < 2000
    found, wanted = built.search(queries * scale, K), TorchSearch(StoredKeys(keys), KNNMoEConfig()).search(queries, K)
    assert (found.rows[:, :, None] == wanted.rows[:, None]).any(dim=-1).double().mean() >= 0.98


def test_a_number_far_from_zero_in_all_keys_hides_no_other():
    keys, queries = clustered(20_000, clusters=400)
    keys[:, 3] += 10_000
    queries[:, 3] += 10_000
    built = NativeIvfSearch(StoredKeys(keys), KNNMoEConfig())
    assert built.budget < 2000 and len(built.lists.centroids) < 2000
    assert share(built.search(queries, K), engine(keys).search(queries, K)) >= 0.98


def test_of_equal_keys_the_first_are_found():
    keys, _ = clustered(20_000, clusters=400)
    equal = torch.arange(500, 20_000, 3)
    keys[equal] = keys[500].clone()
    built = engine(stored_as(keys, torch.int8), "ivf")
    assert built.budget < 2000
    found = built.search(built.keys.floats(equal[:1]), K)
    assert torch.equal(found.rows[0], equal[:K]) and bool((found.distances == 0).all())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("search", [NativeIvfSearch, IvfSearch])
def test_equal_keys_hide_no_other_of_their_list(search, dtype):
    keys, _ = clustered(20_000, clusters=400)
    keys[3000:3800] = keys[3000].clone()
    keys[3800:3820] = keys[3000] + 0.05 * _random(20, 64)
    stored = stored_as(keys, dtype)
    lists = sort_into_lists(stored, 30)
    reach = torch.tensor([512, 512, 20_000] if search is NativeIvfSearch else [512, 1])
    built = search.of_tensors(stored, KNNMoEConfig(), lists._asdict() | {"reach": reach})
    found = built.search(stored.floats(slice(3800, 3820)), K)
    assert torch.equal(found.rows[:, 0], torch.arange(3800, 3820))
    equal = built.search(stored.floats(slice(3000, 3001)), K)
    assert bool((equal.distances == 0).all()) and bool(((equal.rows >= 3000) & (equal.rows < 3800)).all())


def test_lists_take_few_bytes_a_row():
    stored = stored_as(clustered(200_000, width=48)[0], torch.int8)
    assert NativeIvfSearch.of_tensors(stored, KNNMoEConfig(), lists_of_equal_length(stored)).nbytes < 7 * 200_000


def lists_of_equal_length(stored: StoredKeys, length: int = 56) -> dict[str, torch.Tensor]:
    rows = torch.arange(len(stored), dtype=torch.int32)
    starts = torch.tensor([*range(0, len(stored), length), len(stored)], dtype=torch.int32)
    return dict(
        centroids=stored.codes[::length].contiguous(),
        step=stored.step,
        starts=starts,
        rows=rows,
        reach=torch.tensor([512, 512, len(stored)]),
    )


@pytest.mark.parametrize("rows", [1, 5, 700, 5000])
def test_it_is_restored_from_its_tensors(rows, monkeypatch):
    keys, queries = clustered(rows)
    stored = stored_as(keys, torch.int8)
    built = NativeIvfSearch(stored, KNNMoEConfig())
    monkeypatch.setattr(NativeIvfSearch, "_fit", None)
    again = NativeIvfSearch.of_tensors(stored, KNNMoEConfig(), built.tensors())
    wanted, found = built.search(queries, K), again.search(queries, K)
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.distances, wanted.distances)
    assert again.nbytes == built.nbytes


def test_an_index_of_the_other_inverted_file_is_refused():
    keys, _ = clustered(3000)
    other, tensors = engine(keys, UNCOMPILED).tensors(), engine(keys, "ivf").tensors()
    for wrong, some in ((other, keys), (tensors, keys[:2000])):
        with pytest.raises(ValueError, match="build them anew"):
            NativeIvfSearch.of_tensors(StoredKeys(some), KNNMoEConfig(), wrong)
    with pytest.raises(ValueError, match="build them anew"):
        NativeIvfSearch.of_tensors(StoredKeys(keys), KNNMoEConfig(), tensors | {"reach": torch.tensor([0])})


@pytest.mark.parametrize("rows", [3000, 20_000], ids=["each by itself", "in lists"])
@pytest.mark.parametrize("reach", [0, -1, 2**62])
def test_an_index_of_absurd_reach_is_refused(rows, reach):
    stored = stored_as(clustered(rows, clusters=400)[0], torch.int8)
    tensors = NativeIvfSearch(stored, KNNMoEConfig()).tensors()
    wrong = torch.tensor([reach, *tensors["reach"][1:].tolist()])
    with pytest.raises(ValueError, match="build them anew"):
        NativeIvfSearch.of_tensors(stored, KNNMoEConfig(), tensors | {"reach": wrong})


def test_lists_that_lie_beyond_the_keys_are_refused():
    stored = stored_as(clustered(20_000, clusters=400)[0], torch.int8)
    tensors = NativeIvfSearch(stored, KNNMoEConfig()).tensors()
    around = tensors["starts"].clone()
    around[1:3] = torch.tensor([2**31 - 1, -2])  # whose differences, as int32, are all positive
    for wrong in (around, tensors["starts"][:1], tensors["starts"][:0], tensors["starts"].flip(0)):
        with pytest.raises(ValueError, match="build them anew"):
            NativeIvfSearch.of_tensors(stored, KNNMoEConfig(), tensors | {"starts": wrong})
    with pytest.raises(ValueError, match="build them anew"):
        NativeIvfSearch.of_tensors(stored, KNNMoEConfig(), tensors | {"step": tensors["step"] * torch.nan})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("rows", [3000, 20_000], ids=["each by itself", "in lists"])
@pytest.mark.parametrize("backend", ["ivf", UNCOMPILED])
def test_a_query_that_is_not_a_number_gets_rows_and_disturbs_no_other(value, backend, rows):
    keys, queries = clustered(rows, clusters=400)
    built = engine(keys, backend)
    wanted = built.search(queries, 4)
    queries[3] = value
    found = built.search(queries, 4)
    others = torch.arange(300) != 3
    assert torch.equal(found.rows[others], wanted.rows[others])
    assert bool(((found.rows >= 0) & (found.rows < rows)).all())
    if backend == "ivf":
        assert bool((found.rows.sort(dim=-1).values.diff(dim=-1) > 0).all())


@pytest.mark.parametrize("backend", ["torch", "ivf", "hnsw", "faiss"])
def test_queries_of_another_width_are_refused(backend):
    with pytest.raises(ValueError, match="queries of 5 dimensions do not fit keys of 6"):
        engine(_random(2000, 6), backend).search(_random(3, 5), K)


@pytest.mark.parametrize("k", [0, -3])
@pytest.mark.parametrize("backend", ["torch", "ivf", "hnsw", "faiss"])
def test_no_neighbour_at_all_is_refused(backend, k):
    with pytest.raises(ValueError, match=f"{k} neighbours cannot be searched for"):
        engine(_random(2000, 6), backend).search(_random(3, 6), k)


def test_what_compiled_code_cannot_read_is_refused():
    codes = _random(20, 6)
    for wrong in (codes.double(), codes.T, codes.to("meta")):
        with pytest.raises(ValueError, match="not allowed here"):
            native.kernels.Index(wrong, None)
    with pytest.raises(ValueError, match="a step for each column"):
        native.kernels.Index(codes, torch.ones(5))
