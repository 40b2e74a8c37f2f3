"""A sketch of keys in lists: of those that a query is compared with few are read, and hardly a neighbour is lost."""

import pytest
import torch

from knnmoe_hf import KNNMoEConfig
from knnmoe_hf.search import StoredKeys
from knnmoe_hf.search.exact import TorchSearch
from knnmoe_hf.search.lists import Lists, sort_into_lists
from knnmoe_hf.search.native_ivf import NativeIvfSearch
from knnmoe_hf.search.residual_codes import residual_codes
from tests.builds import LEVELS, use_build_for
from tests.search.test_native_ivf import share
from tests.search.test_search import K, _random, clustered, stored_as


def looking_into(stored: StoredKeys, lists, sketch, reach: list[int]) -> NativeIvfSearch:
    tensors = lists._asdict() | (sketch._asdict() if sketch else {}) | {"reach": torch.tensor([*reach, len(stored)])}
    return NativeIvfSearch.of_tensors(stored, KNNMoEConfig(), tensors)


def numbers(sketch, rows: int, width: int) -> torch.Tensor:
    """(N, c) of -8 to 7, in the lists' order."""
    codes = sketch.codes.view(len(sketch.codes), -1, 16).transpose(1, 2).reshape(-1, sketch.codes.shape[1] // 16)
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:rows, :width].double() - 8


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("width", [3, 23, 48, 200])
def test_few_of_the_keys_compared_are_read(level, dtype, width, monkeypatch):
    use_build_for(level, monkeypatch)
    keys, queries = clustered(20_000, width, clusters=20 if width < 24 else 100)
    stored = stored_as(keys, dtype)
    built = NativeIvfSearch(stored, KNNMoEConfig())
    assert built.sketch is not None and built.chosen <= built.budget // 4
    whole = looking_into(stored, built.lists, None, [built.budget] * 2)
    assert share(built.search(queries, K), whole.search(queries, K)) >= 0.99


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [5, 48])
def test_those_are_read_that_are_the_nearest_by_the_sketch(level, width, monkeypatch):
    use_build_for(level, monkeypatch)
    keys, queries = clustered(3001, width, clusters=10)
    keys[:, 0] *= 40  # beyond what four bits can tell, so that it matters which are read
    stored = StoredKeys(keys)
    lists = sort_into_lists(stored, 7)
    sketch = residual_codes(stored, lists)
    found = looking_into(stored, lists, sketch, [3001, 100]).search(queries, K)
    own = torch.repeat_interleave(torch.arange(len(lists.centroids)), lists.starts.diff().long())
    told = numbers(sketch, 3001, width) * sketch.units[own, None] + (lists.centroids * lists.step)[own]
    order = torch.cdist(queries.double(), told).argsort(dim=-1)
    for count, as_near in ((100, torch.le), (130, torch.ge)):  # all of the former, and none beyond the latter
        rows = lists.rows[order[:, :count]].long()
        nearest = (queries[:, None] - keys[rows]).square().sum(dim=-1).sort(dim=-1).values[:, :K]
        assert bool(as_near(found.distances, nearest + (1e-4 if count == 100 else -1e-4) * nearest).all())


def test_a_list_is_sketched_by_its_own_measure():
    keys = torch.cat([_random(300, 24), 1000 + 1e-2 * _random(300, 24, seed=1)])
    stored = StoredKeys(keys[torch.randperm(600, generator=torch.Generator().manual_seed(0))])
    lists = sort_into_lists(stored, 2)
    sketch = residual_codes(stored, lists)
    own = torch.repeat_interleave(torch.arange(2), lists.starts.diff().long())
    apart = stored.codes[lists.rows.long()] - (lists.centroids * lists.step)[own]
    wrong = (numbers(sketch, 600, 24) * sketch.units[own, None] - apart).abs()
    within = apart.abs() <= 7 * sketch.units[own, None]
    assert bool((wrong <= 0.501 * sketch.units[own, None])[within].all()) and within.double().mean() > 0.9


def test_where_a_sketch_leads_astray_more_keys_are_read(monkeypatch):
    monkeypatch.setattr("knnmoe_hf.search.residual_codes._UNIT", 1e-4)  # so that it tells next to nothing of a key
    keys, queries = clustered(20_000, width=8)
    stored = StoredKeys(keys)
    built = NativeIvfSearch(stored, KNNMoEConfig())
    assert built.chosen > 96
    assert share(built.search(queries, K), TorchSearch(stored, KNNMoEConfig()).search(queries, K)) >= 0.98
    again = NativeIvfSearch.of_tensors(stored, KNNMoEConfig(), built.tensors())
    assert torch.equal(again.search(queries, K).rows, built.search(queries, K).rows)


def test_keys_far_from_zero_are_found_by_queries_between_their_codes():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, 48, generator=generator)
    points = centres[torch.randint(200, (20_200,), generator=generator)]
    points += 1000 + 0.3 * torch.randn(20_200, 48, generator=generator)
    built = NativeIvfSearch(stored := stored_as(points[200:], torch.int8), KNNMoEConfig())
    assert built.sketch is not None
    assert share(built.search(points[:200], K), TorchSearch(stored, KNNMoEConfig()).search(points[:200], K)) >= 0.97


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32], ids=str)
def test_keys_that_are_alike_in_a_sketch_are_all_read(dtype):
    keys, _ = clustered(20_000, clusters=400)
    keys[3000:3400] = keys[3000].clone()
    keys[3400:3420] = keys[3000] + 0.05 * _random(20, 64)
    stored = stored_as(keys, dtype)
    lists = sort_into_lists(stored, 30)
    built = looking_into(stored, lists, residual_codes(stored, lists), [1024, 64])
    found = built.search(stored.floats(slice(3400, 3420)), K)
    assert torch.equal(found.rows[:, 0], torch.arange(3400, 3420))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_query_that_is_no_number_disturbs_no_other(level, value, monkeypatch):
    use_build_for(level, monkeypatch)
    keys, queries = clustered(20_000, clusters=400)
    built = NativeIvfSearch(stored_as(keys, torch.int8), KNNMoEConfig())
    assert built.sketch is not None
    wanted = built.search(queries, 4)
    queries[3, 5] = value
    found, others = built.search(queries, 4), torch.arange(300) != 3
    assert torch.equal(found.rows[others], wanted.rows[others])
    assert torch.equal(found.distances[others], wanted.distances[others])
    alone = built.search(queries[3:4], 4)
    assert torch.equal(alone.rows[0], found.rows[3]) and len(found.rows[3].unique()) == 4


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [23, 48])
def test_a_query_gets_the_same_to_the_bit_in_any_company(level, width, monkeypatch):
    use_build_for(level, monkeypatch)
    keys, queries = clustered(20_000, width, clusters=100)
    built = NativeIvfSearch(stored_as(keys, torch.int8), KNNMoEConfig())
    assert built.sketch is not None
    whole = built.search(queries, K)
    for size in (1, 2, 3, 7, 9):
        parts = [built.search(part, K) for part in queries.split(size)]
        assert torch.equal(torch.cat([part.distances for part in parts]), whole.distances)
        assert torch.equal(torch.cat([part.rows for part in parts]), whole.rows)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [1, 7, 4096])
def test_the_largest_numbers_have_room(level, width, monkeypatch):
    use_build_for(level, monkeypatch)
    signs = _random(600, width).sign()
    keys = torch.where(signs == 0, 1, signs) * (1 + 1e-3 * _random(600, width, seed=1))
    stored = StoredKeys(keys)
    lists = sort_into_lists(stored, 4)
    built = looking_into(stored, lists, residual_codes(stored, lists), [600, 200])
    assert bool((built.search(keys[:50], 1).distances == 0).all())


@pytest.mark.parametrize("level", LEVELS)
def test_lists_may_end_anywhere_in_a_block(level, monkeypatch):
    use_build_for(level, monkeypatch)
    keys, queries = clustered(16 * 12 + 5, width=9, spread=2.0)
    stored, sizes = StoredKeys(keys), torch.tensor([1, 15, 16, 17, 2, 3, 1, 1, 1, 40, 31, 69])
    starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    assert starts[-1] == len(keys)
    step = keys.abs().amax(dim=0) / 127
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(1)).int()
    centroids = (keys[order[starts[:-1].long()].long()] / step).round().to(torch.int8)
    lists = Lists(centroids, step, starts, order)
    exact = TorchSearch(stored, KNNMoEConfig()).search(queries, 4)
    found = looking_into(stored, lists, residual_codes(stored, lists), [len(keys), 100]).search(queries, 4)
    assert share(found, exact) >= 0.98
    for budget in range(64, 160, 7):  # the last of the lists is cut
        some = looking_into(stored, lists, residual_codes(stored, lists), [budget, 32]).search(queries, 4)
        whole = looking_into(stored, lists, None, [budget] * 2).search(queries, 4)
        assert share(some, whole) >= 0.9 and bool((some.distances >= whole.distances * (1 - 1e-5)).all())


def test_more_neighbours_than_are_read_are_found_too():
    keys, queries = clustered(20_000, clusters=400)
    stored = stored_as(keys, torch.int8)
    built = NativeIvfSearch(stored, KNNMoEConfig())
    assert built.sketch is not None
    found, wanted = built.search(queries, 300), TorchSearch(stored, KNNMoEConfig()).search(queries, 300)
    assert found.rows.shape == (300, 300) and bool((found.rows.sort(dim=-1).values.diff(dim=-1) > 0).all())
    assert bool((found.distances >= wanted.distances * (1 - 1e-5)).all())


def test_it_takes_half_a_byte_for_each_number():
    stored = stored_as(clustered(20_000, width=48, clusters=400)[0], torch.int8)
    built = NativeIvfSearch(stored, KNNMoEConfig())
    lists = sum(tensor.nbytes for tensor in built.lists)
    assert built.nbytes - built.scan.bytes - lists == 24 * 20_000 + 4 * len(built.lists.centroids)


def test_a_sketch_of_other_keys_is_refused():
    stored = stored_as(clustered(20_000, clusters=400)[0], torch.int8)
    built = NativeIvfSearch(stored, KNNMoEConfig())
    tensors = built.tensors()
    for wrong in (
        {"codes": tensors["codes"][1:]},
        {"codes": tensors["codes"][:, 1:]},
        {"units": tensors["units"][1:]},
        {"codes": tensors["codes"].float()},
        {"units": tensors["units"] * torch.nan},
        {"units": -tensors["units"]},
        {"units": 0 * tensors["units"]},
        {"units": 1e-40 * tensors["units"]},
        {"reach": torch.tensor([512, 64])},
        {"reach": torch.tensor([512, 64, 20_001])},
        {"reach": torch.tensor([512, 0, 20_000])},
        {"reach": torch.tensor([512, 512, 20_000])},
        {"reach": torch.tensor([512, 513, 20_000])},
        {"reach": torch.tensor([512, 2**62, 20_000])},
    ):
        with pytest.raises(ValueError, match="build (it|them) anew"):
            NativeIvfSearch.of_tensors(stored, KNNMoEConfig(), tensors | wrong)
    for missing in ({"units"}, {"codes"}, {"codes", "units"}):
        with pytest.raises(ValueError, match="build (it|them) anew"):
            NativeIvfSearch.of_tensors(stored, KNNMoEConfig(), {n: t for n, t in tensors.items() if n not in missing})


def test_where_many_neighbours_are_wanted_there_is_no_sketch():
    stored = stored_as(clustered(20_000, clusters=400)[0], torch.int8)
    built = NativeIvfSearch(stored, KNNMoEConfig(num_neighbors=200))
    assert built.lists is not None and built.sketch is None and built.tensors().keys().isdisjoint({"codes", "units"})
