"""Inverted files: the same for the same keys, kept as plain tensors, and as wide as they have to be."""

import pytest
import torch

from knnmoe_hf import KNNMoEConfig
from knnmoe_hf.search import StoredKeys
from knnmoe_hf.search.ivf import IvfSearch
from tests.search.test_search import UNCOMPILED, K, _random, clustered, engine, stored_as

CONFIG = KNNMoEConfig(search_backend="ivf")


def recall(found, wanted) -> float:
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.rows.tolist(), wanted.rows.tolist()))
    return hits / wanted.rows.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_most_neighbours_are_found_by_a_look_at_few_keys(dtype):
    keys, queries = clustered(20_000, clusters=400)
    stored = stored_as(keys, dtype)
    built = engine(stored, UNCOMPILED)
    assert built.budget < 1000
    assert recall(built.search(queries, K), engine(stored).search(queries, K)) >= 0.98


def test_keys_without_any_order_are_found_as_well():
    keys = _random(4000, 24)
    queries = _random(200, 24, seed=1)
    assert recall(engine(keys, UNCOMPILED).search(queries, K), engine(keys).search(queries, K)) >= 0.98


def test_the_same_keys_give_the_same_lists_and_each_row_is_in_one():
    keys, _ = clustered(5000)
    one, other = (engine(keys, UNCOMPILED).tensors() for _ in range(2))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["rows"].sort().values, torch.arange(5000).int())
    assert bool((one["starts"].diff() > 0).all())


def test_lists_take_few_bytes_a_row():
    assert engine(stored_as(clustered(20_000, width=48)[0], torch.int8), UNCOMPILED).nbytes < 16 * 20_000


@pytest.mark.parametrize("rows", [1, 5, 700, 5000])
def test_an_engine_is_restored_from_its_tensors(rows, monkeypatch):
    keys, queries = clustered(rows)
    stored = stored_as(keys, torch.int8)
    built = IvfSearch(stored, CONFIG)
    monkeypatch.setattr("knnmoe_hf.search.ivf.sort_into_lists", None)
    monkeypatch.setattr(IvfSearch, "_tuned", None)
    again = IvfSearch.of_tensors(stored, CONFIG, built.tensors())
    wanted, found = built.search(queries, K), again.search(queries, K)
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.distances, wanted.distances)
    assert again.nbytes == built.nbytes


def test_exact_search_is_restored_from_nothing():
    keys, queries = clustered(300)
    built = engine(keys)
    assert built.tensors() == {}
    again = type(built).of_tensors(StoredKeys(keys), KNNMoEConfig(), {})
    assert torch.equal(again.search(queries, K).rows, built.search(queries, K).rows)


@pytest.mark.parametrize("fault", ["other keys", "twice", "beyond", "width", "gap", "order", "reach", "missing"])
def test_tensors_of_other_keys_are_refused(fault):
    keys, _ = clustered(3000)
    tensors = {name: tensor.clone() for name, tensor in engine(keys, UNCOMPILED).tensors().items()}
    if fault == "other keys":
        keys = keys[:2000]
    elif fault == "twice":
        tensors["rows"][0] = tensors["rows"][1]
    elif fault == "beyond":
        tensors["rows"][0] = 3000
    elif fault == "width":
        keys = keys[:, :30]
    elif fault == "gap":
        tensors["starts"][-1] -= 1
    elif fault == "order":
        tensors["starts"][2] = 3000
    elif fault == "reach":
        tensors["reach"][1] = 0
    else:
        del tensors["step"]
    with pytest.raises(ValueError, match="build them anew"):
        IvfSearch.of_tensors(StoredKeys(keys), CONFIG, tensors)


@pytest.mark.parametrize("reach", [(2**62, 5), (3001, 5), (-1, 5), (0, 5), (100, 2**62), (100, 3000), (100,), ()])
def test_more_keys_or_lists_than_there_are_cannot_be_searched(reach):
    keys, _ = clustered(3000)
    tensors = engine(keys, UNCOMPILED).tensors() | {"reach": torch.tensor(reach, dtype=torch.int64)}
    with pytest.raises(ValueError, match="build them anew"):
        IvfSearch.of_tensors(StoredKeys(keys), CONFIG, tensors)


@pytest.mark.parametrize("k", [1, 50, 500, 3000])
def test_more_neighbours_than_the_index_was_tuned_for_are_all_there(k):
    keys, queries = clustered(3000)
    found, wanted = engine(keys, UNCOMPILED).search(queries, k), engine(keys).search(queries, k)
    assert found.rows.shape == (300, k)
    assert bool((found.rows.sort(dim=-1).values.diff(dim=-1) > 0).all())
    assert recall(found, wanted) >= 0.9


def test_no_table_is_larger_than_the_bound(monkeypatch):
    sizes, select = [], torch.Tensor.index_select
    keys, queries = clustered(4000)
    stored = stored_as(keys, torch.int8)
    built = engine(stored, UNCOMPILED, search_max_bytes=2**16)

    def recorded(*args):
        out = select(*args)
        sizes.append(4 * out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "index_select", recorded)
    found = built.search(queries, K)
    assert sizes and max(sizes) <= 2**16
    assert torch.equal(found.rows, engine(stored, UNCOMPILED).search(queries, K).rows)


def test_autocast_and_products_that_round_their_factors_change_nothing():
    keys, queries = clustered(3000, spread=0.05)
    built = engine(stored_as(keys, torch.int8), UNCOMPILED)
    wanted, order = built.search(queries, K), built._nearest_lists(queries, 20)
    mm = torch.mm
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(torch, "mm", lambda left, right: mm(left.bfloat16().float(), right.bfloat16().float()))
        found, again = built.search(queries, K), built._nearest_lists(queries, 20)
    assert torch.equal(again, order)
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.distances, wanted.distances)


def test_lists_that_hold_too_few_keys_are_not_read_beyond_their_ends():
    keys, queries = clustered(3000)
    built = engine(keys, UNCOMPILED)
    first = built._nearest_lists(queries, 2)
    enough = built.sizes[first].sum(dim=-1) >= 12
    assert enough.double().mean() > 0.9
    found = built._nearest(queries[enough], k=4, fetch=12, budget=1000, probes=2)
    own = torch.repeat_interleave(torch.arange(len(built.sizes)), built.sizes)[built.lists.rows.argsort()]
    assert bool((own[found.rows][..., None] == first[enough][:, None]).any(dim=-1).all())
    assert bool((found.rows.sort(dim=-1).values.diff(dim=-1) > 0).all())
